"""The documents are sound, and the check that says so finds what is not."""

from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = util.spec_from_file_location("ninerank_check_docs", ROOT / "scripts" / "check_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_docs = load()


@pytest.mark.parametrize("path", check_docs.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_document_is_sound(path: Path) -> None:
    assert list(check_docs.check(path)) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](gone.md)", "link 'gone.md': no such file"),
        ("![a](gone.png)", "link 'gone.png': no such file"),
        ("[a](#gone)", "link '#gone': no such heading"),
        ("[a](other.md#gone)", "link 'other.md#gone': no such heading"),
        ("[a](../../../../etc/hostname)", "link '../../../../etc/hostname'"),
        ("```python\nx = (\n```", "line 1: python block does not parse"),
        ("\n\n```yaml\na: [\n```", "line 3: yaml block does not parse"),
        ("```json\n{a}\n```", "line 1: json block does not parse"),
        ("```bash\nninerank trian x.yaml\n```", "no such verb of ninerank: trian"),
    ],
)
def test_faults_are_found(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Here\n")
    document = tmp_path / "page.md"
    document.write_text(text)
    found = list(check_docs.check(document, tmp_path))
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "# The way\n[a](#the-way) [b](other.md#here) [c](https://example.com/gone) [d](mailto:a@b.c)",
        "```python\nx = 1\n```\n```yaml\na: 1\n```\n```bash\nninerank doctor --json\n```",
        "```text\n[a](gone.md)\n```",
        "```python\n>>> 1 +\n```",
    ],
)
def test_sound_documents_pass(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Here\n")
    document = tmp_path / "page.md"
    document.write_text(text)
    assert list(check_docs.check(document, tmp_path)) == []
