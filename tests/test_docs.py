"""The documentation: its Python runs, its links and paths lead somewhere, its lines and README are short."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpq_kernels

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", ".github/*.md", "benchmarks/README.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
)
FOLDERS = ("mpq_kernels", "csrc", "tests", "benchmarks", "examples", "docs", ".github", ".ci")
FILE_NAMES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")} | {"setup.py"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
PLACEHOLDER = re.compile(r"NAME|[<>{}]")  # `benchmarks/results/NAME.json`


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_of(page: str) -> list[str]:
    """Words of all code spans and code blocks of a page."""
    text = text_of(page)
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    indented = re.findall(r"^    .*$", text, re.MULTILINE)
    return " ".join([*spans, *indented, *(block for _, block in FENCE.findall(text))]).split()


def anchors_of(path: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolve(name: str):
    """What a dotted name of the package stands for."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:index]))
        found = getattr(found, part)
    return found


def test_readme_is_short():
    words = [word for word in text_of("README.md").split() if re.search(r"\w", word)]
    assert len(words) <= 750


def test_python_of_the_readme_runs(tmp_path):
    """The README's one Python block is examples/quickstart.py, and does what it says."""
    (block,) = (code for language, code in FENCE.findall(text_of("README.md")) if language == "python")
    docstring, _, script = text_of("examples/quickstart.py").partition('"""\n\n')
    assert docstring.startswith('"""') and script == block
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first, _, text = result.stdout.partition("\n")
    assert first == "3.375 stored bits for each packed weight"
    assert "The old house stood" in text and len(text.split()) > 10
    assert (tmp_path / "gutenberg-3bit" / "config.json").exists()


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    """At most 120 columns, but for rows of tables and addresses."""
    lines = enumerate(text_of(page).splitlines(), 1)
    long = [at for at, line in lines if len(re.sub(r"https?://\S+", "", line)) > 120 and not line.startswith("|")]
    assert not long, f"{page}: lines {long}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(text_of(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors_of(path), f"{page}: {target} is none of {sorted(anchors_of(path))}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_code_exist(page):
    """Paths from the root, names of source files, modules that are run, names of the package."""
    missing = []
    for word in map(lambda w: w.strip("\"'(),;:."), code_of(page)):
        if PLACEHOLDER.search(word) or word.startswith("csrc/generated"):
            continue
        if word.split("/")[0] in FOLDERS and "/" in word:
            found = any(ROOT.glob(word.rstrip("/")))
        elif re.fullmatch(r"[\w-]+\.(py|cu|cuh|cpp|h|inl|sh)", word):
            found = word in FILE_NAMES
        elif re.fullmatch(r"benchmarks(\.\w+)+", word):
            path = ROOT / word.replace(".", "/")
            found = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        else:
            continue
        if not found:
            missing.append(word)
    # Kernels' sources are also named in plain text.
    missing += [name for name in re.findall(r"\b(\w+\.(?:cuh?|inl|cpp))\b", text_of(page)) if name not in FILE_NAMES]
    assert not missing, f"{page}: {sorted(set(missing))}"


# Rooms that import a library which the tests do without: their names are looked for in the source.
WITH_OTHERS = ("mpq_kernels.jax", "mpq_kernels.onnx", "mpq_kernels.vllm_plugin")


def written(name: str) -> bool:
    """Whether the source of a room in WITH_OTHERS has a file or a definition of this name."""
    room = ROOT / "mpq_kernels" / name.split(".")[1]
    last = name.split(".")[-1]
    texts = [path.read_text() for path in room.glob("*.py")]
    return room.name == last or (room / f"{last}.py").exists() or any(f"def {last}(" in text for text in texts)


@pytest.mark.parametrize("page", PAGES)
def test_names_in_code_exist(page):
    named = re.findall(r"\bmpq_kernels(?:\.[A-Za-z_]\w*)+", " ".join(code_of(page)))
    named = [name for name in named if not name.endswith((".git", ".egg-info"))]
    assert all(written(name) if name.startswith(WITH_OTHERS) else resolve(name) is not None for name in named)


def test_reference_has_the_public_names():
    names = re.findall(r"^::: (\S+)$", text_of("docs/reference.md"), re.MULTILINE)
    assert len(set(names)) == len(names)
    for name in names:
        resolve(name)
    assert {f"mpq_kernels.{name}" for name in mpq_kernels.__all__} - set(names) == {"mpq_kernels.__version__"}


def test_results_say_where_they_come_from():
    """Each section of docs/results.md with a table of figures has its command and its machine."""
    first, *sections = re.split(r"^##+ ", text_of("docs/results.md"), flags=re.MULTILINE)
    assert first.count("\n|---") == 1  # where which results are
    measured = [section for section in sections if "\n|---" in section or "**Table:**" in section]
    assert len(measured) >= 6
    for section in measured:
        title = section.splitlines()[0]
        command = re.search(r"^\* \*\*Command:\*\*\s+`(make|mpq|python) [^`]+`", section, re.MULTILINE)
        assert command, f"{title}: no command"
        assert re.search(r"^\* \*\*Machine:\*\* \w", section, re.MULTILINE), f"{title}: no machine"
