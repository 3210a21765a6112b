"""Links, paths and names in the README, in docs/ and in comments exist."""

import pkgutil
import re
from pathlib import Path

import pytest

from options.layers import LAYERS1D_ROWS, LAYERS2D_ROWS
from tests.helpers.api_page import api_page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [path for pattern in ("*.py", "*/*.py", "tests/*/*.py", "configs/**/*.yaml", "scripts/*") for path in ROOT.glob(pattern)]
# Files of the published code, in docs/coming_from.md.
PUBLISHED = set(
    """
    main.py layers.py models/vgg.py models/resnet.py models/vit.py models/vit_layers.py vision_main.py language_main.py gpt2.py
    examples/ConViT/demo.py VIT/code/vit.py VIT/code/train.py VIT/code/data.py VIT/code/utils.py plot_result.py masks.py
    models.py data.py eval.py scripts/compare_attention.py scripts/generate_efficiency_plots.py experiments/cifar10/ train.py
    """.split()
)
CREATED = {"mean_mixer.py", "cosine_attention.py", "mixers/cosine_attention.py", "small.yaml", "config.yaml"}  # by readers
FOLDERS = "mixers|models|readers|launch|options|runs|kernels|experiments|tests|examples|configs|scripts|docs|data"
PATH = re.compile(rf"[\w/.*-]+\.(?:py|yaml|sh)|(?:{FOLDERS})/[\w/.*-]*")
RELATIVE_TO = ["", "tests/", "tests/*/", "configs/sweeps/", "configs/sweeps/paper/"]  # a page leaves out the folder it is about


def slugs(page: Path) -> set[str]:
    """Anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def by_name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in slugs(linked), target


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_paths_and_modules_named_on_a_page_exist(page):
    spans = re.findall(r"`([^`\n]+)`", page.read_text())
    paths = {span for span in spans if PATH.fullmatch(span)} - PUBLISHED - CREATED
    for path in paths:
        assert any(any(ROOT.glob(folder + path)) for folder in RELATIVE_TO), path
    for span in set(spans) - paths - CREATED - PUBLISHED:
        dotted = re.match(rf"(?:python -m )?((?:{FOLDERS})\.[\w.]+)", span)
        if dotted:
            pkgutil.resolve_name(dotted[1])


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_tests_named_on_a_page_exist(page):
    for path, name in re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text()):
        assert f"\ndef {name}(" in (ROOT / path).read_text(), name


def test_every_promise_names_its_test():
    rows = [row for row in (ROOT / "docs" / "dev" / "reliability.md").read_text().splitlines() if row.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 25
    for row in promises:
        assert "`tests/" in row or row.endswith("and the tables |"), row


def test_pages_named_in_code_exist():
    for path in CODE:
        for name in re.findall(r"\b(?:docs|docs/dev|data)/\w+\.(?:md|png|csv)\b", path.read_text()):
            assert (ROOT / name).exists(), f"{by_name(path)}: {name}"


def test_the_tables_of_mixers_are_complete():
    _, sequences, maps, *_ = re.split(r"^## ", (ROOT / "docs" / "mixers.md").read_text(), flags=re.M)
    for table, rows in ((sequences, LAYERS1D_ROWS), (maps, LAYERS2D_ROWS)):
        assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.M)) == sorted(rows)


def test_the_api_page_is_current():
    assert (ROOT / "docs" / "api.md").read_text() == api_page(), "run python -m tests.helpers.api_page > docs/api.md"
