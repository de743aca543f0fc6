"""Triton reads TRITON_INTERPRET when a kernel is defined, so interpreted tests have a process of
their own, which test_interpreter.py starts."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
