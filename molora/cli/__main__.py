"""`python -m molora.cli`."""

from . import main

raise SystemExit(main())
