"""README and project pages: their commands, keys, links and tables are true."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qsd_plugin.hosts import fastreid as host

host.activate()

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("projects/*/README.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_named_in_commands_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = "\n".join(blocks(page, "bash"))
    named = set(re.findall(r"(?<![\w/.-])((?:tools|projects|requirements)/[\w./-]+\.(?:py|yml|txt))", commands))
    links = {link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link}
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name
    for link in links:
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_config_keys_in_commands_exist(page: Path) -> None:
    from fastreid.config import get_cfg

    cfg = get_cfg()
    commands = "\n".join(blocks(page, "bash"))
    keys = set(re.findall(r"(?<![\w.])((?:[A-Z][A-Z_]+\.)+[A-Z_]+) ", commands))
    for key in keys:
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page: Path) -> None:
    for block in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def test_patch_table_on_the_page_is_the_real_one() -> None:
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--patches"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    page = (ROOT / "projects/QSD/README.md").read_text(encoding="utf-8")
    assert table in page, "Paste the output of `python tools/doctor.py --patches` into projects/QSD/README.md."


def test_no_placeholder_is_left() -> None:
    for page in PAGES:
        assert not re.search(r"@[A-Z_]+@", page.read_text(encoding="utf-8")), page


def test_study_on_the_pages_comes_from_the_stored_comparison() -> None:
    from qsd_plugin.report.comparison import as_markdown

    summary = json.loads((ROOT / "projects/QSD/results/real_study.json").read_text())
    page = as_markdown(summary).partition("\n\n")[2].strip()
    assert page in (ROOT / "projects/QSD/README.md").read_text(encoding="utf-8")
    assert page.split("\n\n")[1] in (ROOT / "README.md").read_text(encoding="utf-8")


STUDIES = sorted(ROOT.glob("projects/*/results/study_*.json"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_studies_on_a_method_s_page_come_from_stored_comparisons(file: Path) -> None:
    from qsd_plugin.report.comparison import as_markdown

    shown = as_markdown(json.loads(file.read_text(encoding="utf-8"))).partition("\n\n")[2].strip()
    assert shown in (file.parents[1] / "README.md").read_text(encoding="utf-8")


def test_ablation_on_qgface_s_page_comes_from_the_stored_results() -> None:
    stored = json.loads((ROOT / "projects/QGFace/results/ablation.json").read_text(encoding="utf-8"))
    shares = ("low_quality", "low_quality_clean", "low_quality_degraded", "contrasted")
    points = ("clean/accuracy", "mixed/accuracy", "clean/rank-1", "mixed/rank-1")
    page = (ROOT / "projects/QGFace/README.md").read_text(encoding="utf-8")
    for row in stored["rows"]:
        figures = [*(f"{row[key]:.3f}" for key in shares), *(f"{row[key]:.1f}" for key in points)]
        assert f"| {' | '.join([row['coupling'], row['threshold'], *figures])} |" in page


def test_temperatures_on_the_page_are_what_the_formulas_say() -> None:
    from qsd_plugin.methods.qud.temperature import half_saturation_cosine, loss_floor

    page = (ROOT / "projects/QUD/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \| (\S+) \| (\S+) \|$", page, re.M)
    assert len(rows) == 7
    for temperature, size, cosine, floor in rows:
        arguments = float(temperature), int(size), 512
        assert f"{half_saturation_cosine(*arguments):.2f} {loss_floor(*arguments):.4f}" == f"{cosine} {floor}"


def test_label_table_comes_from_the_stored_comparison() -> None:
    from qsd_plugin.report.label_agreement import Direction, TruthAgreement
    from qsd_plugin.report.label_tables import truth_table

    stored = json.loads((ROOT / "projects/QSD/results/labels_demo.json").read_text())
    directions = ("direction", "clear_direction")
    truth = {
        name: TruthAgreement(**{**values, **{key: Direction(**values[key]) for key in directions}})
        for name, values in stored["truth"].items()
    }
    page = (ROOT / "projects/QSD/README.md").read_text(encoding="utf-8")
    assert truth_table(truth) in page
    assert ", ".join(f"{name} {value:.1f}" for name, value in stored["mAP"].items()) in page


def test_result_tables_come_from_the_stored_results() -> None:
    from qsd_plugin.hosts.fastreid.report import as_table

    folder = ROOT / "projects/QSD/results"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = as_table(json.loads((folder / "demo.json").read_text())).strip()
    assert table in text
    assert table in (ROOT / "projects/QSD/README.md").read_text(encoding="utf-8")


BENCHMARKS = sorted(ROOT.glob("projects/*/results/benchmark*.json"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_benchmark_tables_come_from_the_stored_figures(file: Path) -> None:
    table = runpy.run_path(str(ROOT / "tools" / "benchmark.py"))["table"](json.loads(file.read_text())["suites"])
    pages = [ROOT / "README.md", file.parents[1] / "README.md"]
    assert any(table in page.read_text(encoding="utf-8") for page in pages if page.is_file()), (
        f"Paste this into {pages[1].relative_to(ROOT)}:\n{table}"
    )
