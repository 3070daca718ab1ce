"""The report in a real browser: figures and table are seen, nothing overflows, the console is clean."""

import html
import json
import re
import shutil
import subprocess

import pytest
from report_runs import three_phases, write_run

from nitp_titan.report.page import Report
from nitp_titan.report.runs import read_variants

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="not run: needs Chromium (Debian: apt install chromium)")

# Written into the page by the test alone: what the reader sees, as JSON.
_PROBE = """<script>
addEventListener('load', () => {
  const box = e => e.getBoundingClientRect();
  const facts = {
    charts: [...document.querySelectorAll('figure svg')].map(e => [box(e).width, box(e).height]),
    lines: [...document.querySelectorAll('figure svg')].map(e => e.querySelectorAll('path').length),
    cells: [...document.querySelectorAll('table')].map(e => e.querySelectorAll('td').length),
    overflow: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
    page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    tick: getComputedStyle(document.querySelector('figure svg text')).fill,
    requests: performance.getEntriesByType('resource').map(e => e.name),
  };
  parent.postMessage(JSON.stringify(facts), '*');
});
</script>"""
# A frame can be as narrow as a phone, headless Chromium's window cannot.
_FRAME = """<body><script>addEventListener('message', e => document.body.dataset.facts = e.data)</script>
<iframe src="{page}" style="border: 0; width: {width}px; height: 900px"></iframe></body>"""
_DARK = ["--blink-settings=preferredColorScheme=0", "--enable-features=WebContentsForceDark", "--force-dark-mode"]


def look(path, *flags: str, width: int = 1000) -> tuple[dict, list[str]]:
    """Facts of the loaded page, and what stands in the browser's console."""
    frame = path.with_name(f"frame_{width}.html")
    frame.write_text(_FRAME.format(page=path.name, width=width))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=2000", *flags, "--dump-dom", f"file://{frame}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-facts="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), re.findall(r"CONSOLE.*", done.stderr)


def _is_light(color: str) -> bool:
    return sum(map(int, re.findall(r"\d+", color)[:3])) > 380


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for seed in (1, 2, 3):
        write_run(folder / f"ntp/seed_{seed}", seed=seed)
        write_run(folder / f"nitp/seed_{seed}", seed=seed, nitp=three_phases, better=0.1 * seed)
    report = Report(*read_variants([str(folder / "ntp"), str(folder / "nitp")]))
    text = report.html().replace("</body>", _PROBE + "</body>")
    (folder / "index.html").write_text(text)
    return folder / "index.html", len(report.drawings)


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_and_tables_are_seen_at_every_width_in_both_schemes(page, width, scheme):
    path, num_figures = page
    facts, console = look(path, "--window-size=1500,1000", *(_DARK if scheme == "dark" else []), width=width)
    assert console == [] and facts["requests"] == []
    assert facts["width"] == width and facts["overflow"] <= 0
    assert len(facts["charts"]) == num_figures > 10
    assert all(280 < w <= width and h > 180 for w, h in facts["charts"])
    assert all(count > 10 for count in facts["lines"])
    assert len(facts["cells"]) == 3 and all(count > 0 for count in facts["cells"])
    assert _is_light(facts["page"]) == (scheme == "light") != _is_light(facts["ink"])
    assert facts["tick"] == facts["ink"]


def test_the_console_is_not_read_in_vain(page, tmp_path):
    path, _ = page
    spoilt = tmp_path / "index.html"
    spoilt.write_text(path.read_text().replace("</body>", "<script>console.error('spoilt')</script></body>"))
    _, console = look(spoilt)
    assert len(console) == 1 and "spoilt" in console[0]
