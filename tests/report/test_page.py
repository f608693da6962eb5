"""Claims: the report is one file that loads nothing, shows what was recorded, escapes what is hostile, and a real
browser draws it without overflow on a phone, legibly in light and dark mode."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedmira.errors import IntegrityError, UsageError
from fedmira.report.page import render, write_report
from fedmira.report.reading import read
from fedmira.runs.manifest import MANIFEST, SCHEMA

Make = Callable[..., Path]

HOSTILE = '<script>window.pwned=1</script><img src=x onerror="window.pwned=1">"\'&{{7*7}}\x1b[31m\n\u202e\ud800'


class Outline(HTMLParser):
    """What a page is made of: tags in order, attributes, text by enclosing tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open = tag

    def handle_data(self, data: str) -> None:
        if self.open in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())


def hostile_study(make_study: Make) -> Path:
    return make_study(
        methods=("local_only", "mira", HOSTILE),
        seeds=(0,),
        rounds=2,
        name_of=lambda family, k: f"{HOSTILE}{family}-{k}",
        task_of=lambda family: f"{HOSTILE}{family}",
    )


def test_a_study_shows_every_part(make_study: Make) -> None:
    study = make_study()
    page = write_report(study)
    assert page == study / "report" / "index.html"
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.headings[0].startswith("mira has the lowest mean test loss on 3 of 3 seeds")
    assert [heading for heading in outline.headings if heading in SECTIONS] == list(SECTIONS)
    figures = [
        "Difference to training alone, seed by seed",
        "Validation loss of each method",
        "Test loss of each task",
        "mira, graph gram",
        "mira, drawn",
        "The true graph",
        "mira: disagreement energy",
        "Bytes of a whole run",
        "Seconds of a whole run",
    ]
    assert set(figures) <= set(outline.headings)
    assert sum(heading.endswith("harmed") for heading in outline.headings) >= 3
    assert outline.tags.count("svg") == outline.tags.count("figure")


SECTIONS = (
    "The numbers",
    "Who gains, who is harmed",
    "Losses",
    "Who learns from whom",
    "What merging does",
    "What it costs",
    "Learning rates tried",
    "How it was made",
)


def test_a_run_shows_its_clients_config_and_versions(make_run: Make) -> None:
    run = make_run(families=2, clients_per_family=2)
    page = write_report(run).read_text(encoding="utf-8")
    outline = Outline(page)
    expected = ["Validation loss of every client", "Test loss of each task", "The true graph", "Bytes per round"]
    assert set(expected) <= set(outline.headings)
    for text in ("family1-client1", "24 / 6 / 10", "learning_rate: 0.002", "2.13.0", "fedmira", "30.2 MiB"):
        assert text in page
    # per client and per task: loss, perplexity, Rouge-L, exact match
    for summary, first in (("4 clients", "client"), ("2 tasks", "task")):
        table = page.split(f"<summary>{summary}</summary>")[1].split("</table>")[0]
        heads = re.findall(r'scope="col">([^<]*)', table)
        assert (heads[0], heads[-4:]) == (first, ["test loss", "perplexity", "Rouge-L", "exact"])
        assert table.count('scope="row"') == int(summary[0])
    # below the numbers, the tasks and the clients
    assert page.count("at most 8 answers per client, each cut at 32 tokens") == 3
    # a run alone compares with nothing
    assert "vs local" not in page


def test_graphs_can_be_missing_and_runs_unfinished(make_run: Make, make_study: Make) -> None:
    local = Outline(render(read(make_run(method="local_only", finished=False))))
    assert "Who learns from whom" not in local.headings
    assert "Bytes per round" not in local.headings
    assert "The true graph" not in render(read(make_run(true_graph=False)))
    run = make_run()
    graph = json.loads((run / "graph.json").read_text())
    graph["adjacency"] = [[0.0] * 16 for _ in range(16)]
    (run / "graph.json").write_text(json.dumps(graph))
    assert "No edges: nobody was related" in render(read(run))
    unfinished = render(read(make_study(methods=("local_only", "mira"), seeds=(0,), finished=False, tuned=False)))
    assert "No run of this study has finished" in unfinished
    assert "Learning rates tried" not in unfinished
    empty = make_study(methods=(), seeds=())
    assert "No run of this study has finished" in render(read(empty))


def test_the_best_of_a_column_is_marked_and_the_edge_of_a_grid_is_told(make_study: Make) -> None:
    study = make_study(methods=("local_only", "mira"))
    assert "edge of the grid" not in render(read(study))
    content = json.loads((study / "study.json").read_text())
    for entry in content["runs"]:
        entry["learning_rate"] = 5e-3 if entry["method"] == "mira" else 2e-3
    (study / "study.json").write_text(json.dumps(content))
    page = render(read(study))
    assert "edge of the grid for mira:" in page
    row = page[page.index('class="swatch s0"') : page.index("</tbody>")]
    assert row.count('<td class="best">') >= 4


def test_the_best_is_marked_on_the_seeds_that_all_finished_and_nowhere_without_one(make_study: Make) -> None:
    study = make_study(methods=("local_only", "mira", "fedit"), seeds=(0, 1))
    losses = {"local_only": (2.5, 9.0), "mira": (2.0, 8.0), "fedit": (2.4, 0.0)}
    content = json.loads((study / "study.json").read_text())
    for entry in content["runs"]:
        metrics = study / entry["path"] / "metrics.jsonl"
        *others, last = metrics.read_text().splitlines()
        final = json.loads(last)
        for client in final["clients"].values():
            client["loss_sum"] = losses[entry["method"]][entry["seed"]] * client["tokens"]
        metrics.write_text("\n".join([*others, json.dumps(final)]) + "\n")
    runs = content["runs"]
    content["runs"] = [entry for entry in runs if (entry["method"], entry["seed"]) != ("fedit", 1)]
    (study / "study.json").write_text(json.dumps(content))
    page = render(read(study))
    assert '<td class="best">2.000</td>' in page
    assert "Numbers of the one seed that all methods with test numbers finished." in page
    assert "The comparison is not complete" in page
    missing = [("fedit", 1), ("mira", 0)]
    content["runs"] = [entry for entry in runs if (entry["method"], entry["seed"]) not in missing]
    content["tuning"] = []
    (study / "study.json").write_text(json.dumps(content))
    page = render(read(study))
    assert 'class="best"' not in page
    assert "No seed was finished by all methods" in page


@pytest.mark.parametrize(("method", "words"), [("mira", "A cross at the right end"), ("local_only", "seed 1.")])
def test_a_seed_whose_loss_is_not_finite_is_told_beside_the_chart(make_study: Make, method: str, words: str) -> None:
    study = make_study(methods=("local_only", "mira"), seeds=(0, 1))
    heading = "Difference to training alone, seed by seed"
    whole = render(read(study)).split(heading)[1].split("</figure>")[0]
    metrics = study / f"runs/{('local_only', 'mira').index(method)}-seed1" / "metrics.jsonl"
    *others, last = metrics.read_text().splitlines()
    final = json.loads(last)
    next(iter(final["clients"].values()))["loss_sum"] = None
    metrics.write_text("\n".join([*others, json.dumps(final)]) + "\n")
    figure = render(read(study)).split(heading)[1].split("</figure>")[0]
    assert words in figure
    assert words not in whole
    assert figure.count("<circle") == whole.count("<circle") - 1


def test_the_table_explains_the_columns_that_it_has(make_study: Make) -> None:
    note = render(read(make_study())).split("Test data, every client")[1].split("</p>")[0]
    assert "<b>vs local</b>" in note
    assert "<b>harmed</b>" in note
    without = render(read(make_study(methods=("fedit", "mira"))))
    assert "vs local" not in without
    assert "<b>harmed</b>" not in without
    assert "The best of a column is marked" in without


def test_one_grid_for_every_method_is_claimed_only_where_it_is_so(make_study: Make) -> None:
    study = make_study(methods=("local_only", "fedit", "mira"))
    same, unlike = "The same grid for every method", "<b>Not every method was given the same rates</b> (others: {}),"
    assert same in render(read(study))
    content = json.loads((study / "study.json").read_text())

    def page(kept: Callable[[dict[str, Any]], bool], ran: float = 2e-3) -> str:
        for entry in content["runs"]:
            entry["learning_rate"] = ran if entry["method"] == "mira" else 2e-3
        changed = {**content, "tuning": [entry for entry in content["tuning"] if kept(entry)]}
        (study / "study.json").write_text(json.dumps(changed))
        return render(read(study))

    pages = [
        page(lambda entry: entry["method"] != "mira" or entry["learning_rate"] != 5e-3),
        page(lambda entry: entry["method"] != "mira"),
        page(lambda entry: True, ran=1e-2),
    ]
    for one in pages:
        assert unlike.format("mira") in one
        assert same not in one
    # what is tuned and has no runs yet is not compared
    content["runs"] = [entry for entry in content["runs"] if entry["method"] != "mira"]
    assert same in page(lambda entry: entry["method"] != "mira" or entry["learning_rate"] == 1e-3)


def cut_short(study: Path, method: str, seed: int) -> None:
    """Leave one round of a run, and its graph as it is."""
    [entry] = [
        entry
        for entry in json.loads((study / "study.json").read_text())["runs"]
        if (entry["method"], entry["seed"]) == (method, seed)
    ]
    metrics = study / entry["path"] / "metrics.jsonl"
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    first = [event for event in events if event["event"] != "final" and event["round"] == 1]
    metrics.write_text("".join(json.dumps(event) + "\n" for event in first))


def section_of(page: str, heading: str) -> str:
    return page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]


def test_a_run_that_is_not_finished_is_not_averaged_into_what_a_whole_run_costs(make_study: Make) -> None:
    study = make_study(methods=("local_only", "fedit"), seeds=(0, 1))
    whole = section_of(render(read(study)), "What it costs")
    assert whole.count("mean over seeds") == 2
    assert "fedit, upload: 96.0 MiB" in whole
    cut_short(study, "fedit", 1)
    costs = section_of(render(read(study)), "What it costs")
    assert "fedit, upload: 96.0 MiB" in costs
    assert "mean over seeds" not in costs
    assert "Not finished" not in costs
    cut_short(study, "fedit", 0)
    costs = section_of(render(read(study)), "What it costs")
    assert "fedit, upload: 12.0 MiB" in costs
    assert costs.count("Not finished, so what was spent so far: fedit.") == 2


def test_graphs_are_those_of_finished_runs_and_their_own_seed_is_named(make_study: Make) -> None:
    study = make_study(methods=("local_only", "mira"), seeds=(0, 1))

    def introduction() -> str:
        return section_of(render(read(study)), "Who learns from whom").split("</p>")[0]

    assert "Graphs after the last round, seed 0; clients are ordered by label." in introduction()
    cut_short(study, "mira", 0)
    assert "Graphs after the last round, seed 1; clients are ordered by label." in introduction()
    assert "Not finished" not in introduction()
    cut_short(study, "mira", 1)
    assert "seed 0; clients are ordered by label. Not finished, so after the last round so far: mira." in introduction()


def test_graphs_of_different_seeds_are_told_apart(make_study: Make) -> None:
    study = make_study(methods=("mira_published", "mira"), seeds=(0, 1))
    content = json.loads((study / "study.json").read_text())
    kept = [("mira_published", 0), ("mira", 1)]
    content["runs"] = [entry for entry in content["runs"] if (entry["method"], entry["seed"]) in kept]
    (study / "study.json").write_text(json.dumps(content))
    section = section_of(render(read(study)), "Who learns from whom")
    assert "Graphs after the last round, mira on seed 1, mira_published on seed 0; clients" in section


def test_a_mean_over_tasks_is_named_only_where_there_are_tasks(make_run: Make) -> None:
    assert "over tasks" in render(read(make_run()))
    unlabelled = render(read(make_run(task_of=lambda family: "")))
    assert "over tasks" not in unlabelled
    assert "task mean" not in unlabelled


def test_one_file_that_loads_nothing(make_study: Make) -> None:
    page = render(read(make_study()))
    outline = Outline(page)
    assert not set(outline.tags) & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "a"}
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
    assert not [(name, value) for name, value in outline.attributes if name in loading]
    assert not re.search(r"https?:|url\(|@import|@font-face", page)
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert "default-src 'none'" in page
    assert len(page) < 300_000


def test_hostile_names_are_text(make_study: Make) -> None:
    page = write_report(hostile_study(make_study)).read_text(encoding="utf-8")
    outline = Outline(page)
    assert not set(outline.tags) & {"script", "img"}
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert "&lt;script&gt;" in page
    assert not [c for c in page if not c.isprintable() and c not in "\n\xa0"]
    assert "{{7*7}}" in page
    assert ">49" not in page


def test_hostile_contents_of_config_and_manifest_are_text(make_run: Make) -> None:
    run = make_run()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"versions": {HOSTILE: HOSTILE}, "data": {HOSTILE: [HOSTILE] * 9}, "created": HOSTILE}
    (run / "manifest.json").write_text(json.dumps(manifest))
    config = run / "config.resolved.yaml"
    config.write_text(config.read_text() + "note: '</pre><script>window.pwned=1</script>'\n")
    page = render(read(run))
    assert "script" not in Outline(page).tags
    page.encode("utf-8")


def test_unusable_records_are_counted_over_all_files_though_few_are_listed(make_run: Make) -> None:
    run = make_run()
    manifest = json.loads((run / "manifest.json").read_text())
    bad = [[3, "not JSON"]]
    counts = {"examples": 10, "unusable_records": 1, "first_unusable": bad}
    manifest["data"] = {"source": "jsonl", "files": [{"path": f"d/{n}.jsonl", **counts} for n in range(9)]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "9 of 99 records, in 9 of 9 files (0.jsonl record 3: not JSON;" in render(read(run))


def test_equal_records_give_equal_pages_and_writing_again_replaces(make_study: Make) -> None:
    study = make_study(seeds=(0,))
    first = write_report(study).read_bytes()
    assert write_report(study).read_bytes() == first
    assert [entry.name for entry in (study / "report").iterdir()] == ["index.html"]


def test_nothing_is_written_for_other_or_damaged_folders(tmp_path: Path, make_run: Make) -> None:
    with pytest.raises(UsageError):
        write_report(tmp_path)
    run = make_run()
    (run / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(IntegrityError):
        write_report(run)
    assert not (run / "report").exists()
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("graph.json", "[" * 100_000),
        ("manifest.json", "[" * 100_000),
        ("manifest.json", '{"clients": [{"name": "a", "test": 1e400}]}'),
        ("config.resolved.yaml", "[" * 3_000),
        ("config.resolved.yaml", "seed: " + "9" * 5_000),
        ("study.json", "[" * 100_000),
        ("study.json", '{"runs": ' + "9" * 5_000 + "}"),
        ("study.json", '{"runs": [], "methods": [], "seeds": [1e400]}'),
        ("study.json", '{"runs": [], "methods": [], "seeds": [], "tuning": [3]}'),
    ],
    ids=lambda text: text[:45],
)
def test_what_no_run_and_no_comparison_writes_is_damage_and_no_fault_of_the_program(
    make_run: Make, make_study: Make, file: str, text: str
) -> None:
    path = make_study(seeds=(0,)) if file == "study.json" else make_run()
    (path / file).write_text(text)
    with pytest.raises(IntegrityError):
        write_report(path)


def test_a_run_whose_manifest_is_of_a_later_schema_is_not_read(make_run: Make, make_study: Make) -> None:
    run, study = make_run(), make_study()
    for path in (run, next(study.glob("runs/*"))):
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(manifest | {"schema": SCHEMA}))
        read(path)
        (path / MANIFEST).write_text(json.dumps(manifest | {"schema": SCHEMA + 1}))
    for path in (run, study):
        with pytest.raises(IntegrityError, match=r"manifest\.json has schema 2, this version of fedmira reads 1"):
            write_report(path)
        assert not (path / "report").exists()


def test_a_run_that_failed_before_its_first_round_is_said_to_have_none(make_run: Make) -> None:
    run = make_run()
    (run / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="manifest"):
        write_report(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"has no finished round yet; continue it with `fedmira run CONFIG --resume`"):
        write_report(run)
    assert not (run / "report").exists()


def test_a_page_of_eighty_clients_stays_small(make_study: Make) -> None:
    study = make_study(
        seeds=(0,),
        families=16,
        clients_per_family=5,
        rounds=60,
        name_of=lambda family, k: f"task{family:04d}_question_answering_generation-{k}",
        task_of=lambda family: f"task{family:04d}_question_answering_generation",
    )
    assert write_report(study).stat().st_size < 300_000


# ----------------------------------------------------------------------------------------------------------- a browser

PROBE = """
<!doctype html><html><head><style>:root {{ color-scheme: light dark; }}</style></head><body>{frames}
<pre id="result"></pre>
<script>
const channels = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map(Number);
const luminance = (colour) => channels(colour)
  .map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {{
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}};
const paper = (element, view) => {{
  for (let e = element; e; e = e.parentElement) {{
    const colour = view.getComputedStyle(e).backgroundColor;
    if (channels(colour).length === 3 && !/, 0\\)$/.test(colour)) return colour;
  }}
}};
const look = (frame) => {{
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const colours = {{}};
  for (const theme of ["", "light", "dark"]) {{
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    const worst = (found, of) => Math.min(...[...found].map((e) => contrast(of(e), paper(e, view))));
    colours[theme || "preferred"] = {{
      background: view.getComputedStyle(page.body).backgroundColor,
      text: worst(page.querySelectorAll("h1,h2,h3,p,li,td,th,figcaption,dt,dd,small,summary"),
        (e) => view.getComputedStyle(e).color),
      letters: worst(page.querySelectorAll("svg text"), (e) => view.getComputedStyle(e).fill),
      shapes: Math.min(...[...page.querySelectorAll(".swatch")].map(
        (e) => contrast(view.getComputedStyle(e).backgroundColor, paper(e.parentElement, view)))),
    }};
  }}
  const texts = [...page.querySelectorAll("svg text")].filter((e) => e.getClientRects().length);
  const outside = [...page.querySelectorAll("svg text")].filter((e) => {{
    const box = e.getBoundingClientRect(), card = e.closest("figure").getBoundingClientRect();
    return box.width && (box.left < card.left + 1 || box.right > card.right - 1);
  }});
  return {{
    width: view.innerWidth, scrollWidth: root.scrollWidth, charts: page.querySelectorAll("svg.chart").length,
    drawn: [...page.querySelectorAll("svg.chart")].filter((e) => e.getBoundingClientRect().height > 20).length,
    folded: page.querySelectorAll("details:not([open]) svg.chart").length,
    smallest: Math.min(...texts.map((e) => {{
      const turned = e.getScreenCTM();
      return parseFloat(view.getComputedStyle(e).fontSize) * Math.hypot(turned.a, turned.b);
    }})),
    outside: outside.map((e) => e.textContent), requests: view.performance.getEntriesByType("resource").length,
    pwned: view.pwned === undefined ? null : view.pwned, heading: page.querySelector("h1").textContent, colours,
  }};
}};
window.onload = () => {{
  document.getElementById("result").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
}};
</script></body></html>
"""
"""Holds the untouched page in frames as wide as a phone and a desk and writes down what the browser makes of it."""


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., str]:
    """`browser(path, *options)` opens a file in headless Chromium and returns the DOM; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser found (looked for {', '.join(names)}); Debian's package is `chromium`")

    def open_(path: Path, *options: str) -> str:
        profile = tmp_path / "profile"
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--disable-background-networking", "--no-first-run", "--disable-sync", "--disable-component-update"]
        command += ["--disable-dev-shm-usage", "--virtual-time-budget=4000", *options, "--dump-dom", path.as_uri()]
        # a home of its own: the browser must neither read nor leave anything in the user's
        environment = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, timeout=120, check=True, env=environment)
        shutil.rmtree(profile, ignore_errors=True)
        return done.stdout.decode("utf-8")

    return open_


@pytest.fixture
def looked_at(browser: Callable[..., str], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`looked_at(page, dark)` returns what a browser sees of a page at the width of a phone and of a desk."""

    def look(page: Path, *, dark: bool) -> list[dict[str, Any]]:
        source = html.escape(page.read_text(encoding="utf-8"), quote=True)
        frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{source}"></iframe>' for w in (390, 1200))
        probe = tmp_path / "probe.html"
        probe.write_text(PROBE.format(frames=frames), encoding="utf-8")
        dom = browser(probe, f"--blink-settings=preferredColorScheme={0 if dark else 1}")
        found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
        assert found, dom[-2000:]
        return json.loads(html.unescape(found[1]))

    return look


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_draws_a_study_on_phone_and_desk(make_study: Make, looked_at: Any, dark: bool) -> None:
    phone, desk = looked_at(write_report(make_study(families=6, clients_per_family=3)), dark=dark)
    assert (phone["width"], desk["width"]) == (390, 1200)
    for view in (phone, desk):
        assert view["charts"] == view["drawn"] >= 12
        assert view["scrollWidth"] <= view["width"]
        assert view["outside"] == []
        assert view["requests"] == 0
        assert view["heading"].startswith("mira has the lowest mean test loss")
        light_background, dark_background = (view["colours"][theme]["background"] for theme in ("light", "dark"))
        assert light_background != dark_background
        assert view["colours"]["preferred"]["background"] == (dark_background if dark else light_background)
        for theme in ("light", "dark"):
            seen = view["colours"][theme]
            # WCAG 2.2: 4.5 for text, 3 for parts of a drawing that carry meaning
            assert seen["text"] >= 4.5, (theme, seen)
            assert seen["letters"] >= 4.5, (theme, seen)
            assert seen["shapes"] >= 3.0, (theme, seen)
    assert phone["smallest"] >= 8.5


def test_a_browser_runs_nothing_that_a_name_smuggles_in(make_study: Make, looked_at: Any) -> None:
    for view in looked_at(write_report(hostile_study(make_study)), dark=False):
        assert view["pwned"] is None
        assert view["requests"] == 0
        assert view["scrollWidth"] <= view["width"]
        assert view["charts"] == view["drawn"] >= 8


@pytest.mark.parametrize(("labelled", "families", "each"), [(True, 12, 4), (False, 24, 1), (False, 4, 1)])
def test_a_browser_draws_a_run_of_long_names(
    make_run: Make, looked_at: Any, labelled: bool, families: int, each: int
) -> None:
    run = make_run(
        families=families,
        clients_per_family=each,
        name_of=lambda family, k: f"{'long' * 12}{family}-{k}",
        task_of=lambda family: f"{'word' * 12}{family}" if labelled else "",
    )
    for view in looked_at(write_report(run), dark=False):
        assert view["scrollWidth"] <= view["width"]
        assert view["outside"] == []
        assert view["charts"] == view["drawn"] >= 6


def test_the_peak_of_a_study_is_said_to_depend_on_other_runs(make_study: Make, make_run: Make) -> None:
    note = "runs of one process share its memory, so a peak also depends on the runs before it"
    assert note in render(read(make_study(seeds=(0,))))
    assert note not in render(read(make_study(methods=("mira",), seeds=(0,))))
    assert note not in render(read(make_run()))
