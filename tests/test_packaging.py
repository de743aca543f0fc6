"""What pip builds from this tree: complete, importable from anywhere, and in nobody's way."""

import ast
import configparser
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {"molora": ROOT, "molora_kernels": ROOT / "kernels"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def requirements(lines: str) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines.strip().splitlines() if line[:1] not in ("", "#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def package_files(pattern: str) -> set[str]:
    """Paths as the wheel should have them, such as `molora_kernels/dense.py`."""
    return {
        path.relative_to(root).as_posix()
        for package, root in SOURCE_ROOTS.items()
        for path in (root / package).rglob(pattern)
    }


def module_names() -> list[str]:
    files = package_files("*.py")
    dotted = {name.removesuffix(".py").replace("/", ".") for name in files}
    return sorted(name.removesuffix(".__init__") for name in dotted if "__main__" not in name)


# ---------------------------------------------------------------- setup.cfg against the folders


def test_setup_cfg_lists_every_package():
    listed = setup_cfg()["options"]["packages"].split()
    found = {
        Path(name).parent.as_posix().replace("/", ".") for name in package_files("__init__.py")
    }
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("folder", ["kernels", "tests/kernels"])
def test_the_folders_named_kernels_are_not_packages(folder: str):
    # Hugging Face's distribution `kernels`, which transformers imports, must stay in front
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_import_of_the_library_is_declared():
    # triton arrives with every CUDA build of torch; nothing imports it where it is missing
    declared = set(requirements(setup_cfg()["options"]["install_requires"])) | {"triton"}
    provided_by = packages_distributions()
    undeclared = set()
    for package, root in SOURCE_ROOTS.items():
        for path in (root / package).rglob("*.py"):
            for name in top_level_imports(path) - set(SOURCE_ROOTS) - sys.stdlib_module_names:
                if declared.isdisjoint(map(canonicalize_name, provided_by.get(name, [name]))):
                    undeclared.add((path.relative_to(root).as_posix(), name))
    assert undeclared == set()


def top_level_imports(path: Path) -> set[str]:
    """First components of what the file imports when it is imported, `try` and `if` left out."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_constraints_pin_what_setup_cfg_names_within_its_bounds():
    text = (ROOT / "constraints.txt").read_text()
    pins = requirements("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    config = setup_cfg()
    named = requirements(config["options"]["install_requires"])
    for lines in config["options.extras_require"].values():
        named |= requirements(lines)
    named.pop("molora")  # one extra naming another
    assert set(named) <= set(pins)
    for name, requirement in named.items():
        # the newest allowed version: the pin itself, or the upper end of a range
        newest = max((s for s in pins[name].specifier), key=lambda s: s.operator in ("==", "<="))
        assert requirement.specifier.contains(newest.version), (name, newest)


def test_constraints_are_portable():
    # a local path, URL or "+cpu" would tie the set to the machine that it was frozen on
    pins = re.sub(r"#.*", "", (ROOT / "constraints.txt").read_text())
    assert not re.search(r"[/@+]", pins)


# ---------------------------------------------------------------- what pip builds and installs


def run(*command: str | Path, cwd: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without its history and products, for builds write into the tree they build."""
    copied = tmp_path_factory.mktemp("checkout")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
        copy(ROOT / name, copied)
    for name in ("configs", "kernels", "molora", "train"):
        if (ROOT / name).exists():
            copytree(ROOT / name, copied / name, ignore=ignore_patterns("__pycache__"))
    return copied


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Built through a source distribution, as an index would: what that drops, the wheel lacks."""
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run("-W", "error", "-c", build, cwd=tree)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "wheel", *offline, "-w", tree / "dist", sdist, cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:  # what installing a pure wheel into a folder does
        archive.extractall(target)
    return target


@pytest.fixture(scope="module")
def editable_site(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("editable")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", *offline, "--target", target, "-e", tree, cwd=tree)
    return target


def test_the_wheel_has_every_file_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = set(archive.namelist()) - names
    assert names == package_files("*.py") | package_files("py.typed") | package_files("*.json")
    files = {name.split(".dist-info/")[1] for name in metadata}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= files


IMPORT_EVERYTHING = """
import sys
sys.path[1:1] = {first!r}       # sys.path[0] is the current folder, as for any `python -c`
import site
site.addsitedir({site!r})
sys.path.append({packages!r})
import importlib
for name in {modules!r}:
    importlib.import_module(name)
import transformers.integrations.hub_kernels, transformers.modeling_utils
for name in ("molora", "molora_kernels", "kernels"):
    print(getattr(sys.modules.get(name), "__file__", None))
"""


def import_everything(site: Path, cwd: Path, first: Path | None = None) -> list[str]:
    """Import every module in a new interpreter that sees `site`, this one's packages and no more.

    `-S` keeps the development environment's own editable install of molora out: its import hook
    would find whatever the tested one lacks.

    Returns the files of molora, molora_kernels and `kernels`, "None" where nothing imported it.
    """
    code = IMPORT_EVERYTHING.format(
        first=[str(first)] if first else [],
        site=str(site),
        packages=sysconfig.get_path("purelib"),
        modules=module_names(),
    )
    return run("-S", "-c", code, cwd=cwd).split()[-3:]


@pytest.fixture
def stub_kernels(tmp_path: Path) -> Path:
    """A distribution `kernels` that transformers accepts: right version, every name it asks for."""
    metadata = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    package = tmp_path / "kernels" / "__init__.py"
    for path in (metadata, package):
        path.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    package.write_text(STUB)
    return tmp_path


STUB = """
def decorate(*_):
    return lambda decorated: decorated

use_kernel_forward_from_hub = use_kernelized_func = decorate

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
"""


def test_the_wheel_imports_from_elsewhere(site: Path, tmp_path: Path):
    molora, molora_kernels, kernels = import_everything(site, cwd=tmp_path)
    assert Path(molora) == site / "molora" / "__init__.py"
    assert Path(molora_kernels) == site / "molora_kernels" / "__init__.py"
    assert "molora" not in kernels


@pytest.mark.slow
def test_the_wheel_imports_from_the_repository_root(site: Path, tree: Path):
    # the current folder comes first, so this molora is the checkout's
    molora, molora_kernels, _ = import_everything(site, cwd=tree)
    assert Path(molora) == tree / "molora" / "__init__.py"
    assert Path(molora_kernels) == site / "molora_kernels" / "__init__.py"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["elsewhere", "root"])
def test_the_editable_install_imports(editable_site: Path, tree: Path, tmp_path: Path, where: str):
    cwd = tree if where == "root" else tmp_path
    molora, molora_kernels, _ = import_everything(editable_site, cwd)
    assert Path(molora) == tree / "molora" / "__init__.py"
    assert Path(molora_kernels) == tree / "kernels" / "molora_kernels" / "__init__.py"


# The root is where our folder kernels/ could hide the distribution; elsewhere a wheel could.
@pytest.mark.parametrize(
    ("install", "where"),
    [
        ("editable", "root"),
        pytest.param("wheel", "elsewhere", marks=pytest.mark.slow),
        pytest.param("wheel", "root", marks=pytest.mark.slow),
    ],
)
def test_an_installed_distribution_named_kernels_stays_in_front(
    install: str,
    where: str,
    tree: Path,
    stub_kernels: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
):
    chosen = request.getfixturevalue("site" if install == "wheel" else "editable_site")
    cwd = tree if where == "root" else tmp_path.parent
    _, molora_kernels, kernels = import_everything(chosen, cwd, first=stub_kernels)
    assert Path(kernels) == stub_kernels / "kernels" / "__init__.py"
    assert Path(molora_kernels).parent.name == "molora_kernels"
