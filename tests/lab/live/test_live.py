"""The live page: what a run has written, in pieces, its state in words, and a server that only this machine reaches."""

import json
import re
import socket
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.resources import files

import pytest
from accessible import check_accessible

from remoe.errors import CheckpointError, RemoeError
from remoe.lab.cli.main import main
from remoe.lab.files import locked
from remoe.lab.live import growth as growth_module
from remoe.lab.live.growth import MOST_ROWS, Growth, thinned
from remoe.lab.live.server import LiveServer, serving
from remoe.lab.training.config import TrainConfig
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.yaml_files import to_yaml


def line(step, **more):
    record = {"step": step, "lm_loss": 5.0 - step, "sparsity": 0.5, "lambda": 1e-3, "tokens_per_second": 10.0}
    return json.dumps(record | {"load_per_expert": [[0.1 * step, 0.2]]} | more) + "\n"


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "<img src=x onerror=alert(1)>")
    folder.path.mkdir()
    config = TrainConfig(steps=10, num_experts=2, batch_size=2, micro_batch_size=2, seq_len=5)
    folder.config.write_text(to_yaml(config.to_dict()))
    return folder


def finish(run):
    figures = dict.fromkeys(
        ["total_parameters", "active_parameters", "tokens", "flops", "peak_memory_bytes", "seconds", "final_sparsity"],
        1,
    )
    figures |= {"steps": 10, "validation_loss": 2.5, "target_sparsity": 0.5, "outcome": ["It went well."]}
    run.summary.write_text(json.dumps(figures | {"validation": {"all": {"loss": 2.5, "sparsity": 0.5}}}))


def test_only_what_is_new_and_whole_is_sent(run):
    growth = Growth(run)
    assert growth.answer(0, 0)["rows"] == []
    whole = line(1, validation_loss={"all": 4.5, "farm": 4.0}) + line(2)
    run.metrics.write_text(whole + '{"step": 3, "lm_')
    first = growth.answer(0, 0)
    assert first["rows"] == [[1, 4.0, 0.5, 1e-3, 10.0], [2, 3.0, 0.5, 1e-3, 10.0]]
    assert first["validation"] == [[1, 4.5]]
    assert first["load"] == [[0.2, 0.2]]
    assert first["target"] == 0.5
    run.metrics.write_text(whole + line(3, **{"lambda": float("nan")}))
    second = growth.answer(first["epoch"], 2)
    assert (second["epoch"], second["rows"]) == (first["epoch"], [[3, 2.0, 0.5, None, 10.0]])


def test_a_resumed_run_is_read_anew(run):
    growth = Growth(run)
    run.metrics.write_text(line(1) + line(2) + line(3))
    epoch = growth.answer(0, 0)["epoch"]
    other = run.path / "new"
    other.write_text(line(1) + line(2, lm_loss=9.0) + line(3) + line(4))
    other.replace(run.metrics)
    answer = growth.answer(epoch, 3)
    assert answer["epoch"] != epoch
    assert [row[:2] for row in answer["rows"]] == [[1, 4.0], [2, 9.0], [3, 2.0], [4, 1.0]]


def test_the_state_is_said_in_words(run, monkeypatch):
    growth = Growth(run)
    state, (words,) = growth.state()
    assert state == "stopped"
    assert "--resume" in words
    growth.look()  # at no record
    run.metrics.write_text(line(4))
    growth.look()
    assert growth.state() == ("training", ["Training: step 4 of 10, about 0:06 left."])  # 6 steps of 10 tokens
    monkeypatch.setattr(growth_module, "QUIET_SECONDS", 0.0)
    assert growth.state()[0] == "stopped"
    with locked(run.path, RemoeError()):
        assert growth.state()[0] == "training"
    finish(run)
    assert growth.state() == ("finished", ["Finished: 10 steps, validation loss 2.5000.", "It went well."])
    run.config.rename(run.path / "elsewhere")
    assert growth.state()[0] == "gone"


def test_thinning_keeps_every_spike():
    rows = [[step, 1.0, 0.5, None, 10.0] for step in range(1, 50_001)]
    rows[12_345][1], rows[20_000][4] = 99.0, 0.1
    few = thinned(rows)
    assert len(few) <= 1.1 * MOST_ROWS
    assert rows[12_345] in few
    assert rows[20_000] in few
    assert few[-1] == rows[-1]
    assert [row[0] for row in few] == sorted({row[0] for row in few})
    assert thinned(rows[:MOST_ROWS]) == rows[:MOST_ROWS]


@contextmanager
def opened(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
        yield answer


def test_the_page_is_served_without_any_other_address(run):
    run.metrics.write_text(line(1))
    with serving(Growth(run), 0) as url:
        assert url.startswith("http://127.0.0.1:")
        with opened(url) as answer:
            page = answer.read().decode()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "http" not in page.replace("http-equiv", "")
        for name in ("page.js", "page.css"):
            with opened(url + name) as answer:
                assert answer.read() == files("remoe.lab.live").joinpath(name).read_bytes()
        with opened(f"{url}data?epoch=x&after=-1") as answer:
            data = json.load(answer)
        assert data["rows"] == [[1, 4.0, 0.5, 1e-3, 10.0]]
        assert data["name"].startswith("<img src=x")  # the page sets it as text
        for path, headers, status in (("secret", {}, 404), ("data", {"Host": "evil.example"}, 403)):
            with pytest.raises(urllib.error.HTTPError) as caught, opened(url + path, **headers):
                pass
            assert caught.value.code == status
    with pytest.raises(urllib.error.URLError), opened(url):
        pass


def test_the_script_sets_no_html():
    script = files("remoe.lab.live").joinpath("page.js").read_text()
    assert "innerHTML" not in script
    assert "insertAdjacentHTML" not in script


def test_another_port_is_taken_where_the_first_is_not_free(run):
    with socket.create_server(("127.0.0.1", 0)) as first:
        taken = first.getsockname()[1]
        server = LiveServer(Growth(run), taken)
        server.server_close()
        assert server.server_port != taken


def test_what_is_not_a_run_is_one_line(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "is not a run" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--port", "70000"]) == 2
    assert "--port must be between" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        Growth(RunFolder(tmp_path))


def test_a_run_serves_its_page_while_it_trains(corpus, tmp_path, capsys, monkeypatch):
    from tiny_run import FLAGS

    asked = []

    @contextmanager
    def counting(growth):
        with serving(growth, 0) as url:
            yield url
            with opened(f"{url}data") as answer:
                asked.append(json.load(answer))

    monkeypatch.setattr("remoe.lab.training.train.serving", counting)
    out = tmp_path / "run"
    assert main(["train", "--data", str(corpus), "--out", str(out), "--steps", "3", "--live", *FLAGS]) == 0
    assert "live http://127.0.0.1:" in capsys.readouterr().out
    assert [row[0] for row in asked[0]["rows"]] == [1, 2, 3]
    assert asked[0]["state"] == "finished"


def test_what_a_run_wrote_before_does_not_count_as_training(run):
    run.metrics.write_text(line(1) + line(2))
    growth = Growth(run)
    assert growth.answer(0, 0)["state"] == "stopped"
    with run.metrics.open("a") as file:
        file.write(line(3))
    assert growth.answer(0, 0)["state"] == "training"


def test_a_page_of_an_earlier_server_takes_all_rows_anew(run, monkeypatch):
    earlier = Growth(run).answer(0, 0)["epoch"]
    now = growth_module.time.time_ns()
    monkeypatch.setattr(growth_module.time, "time_ns", lambda: now + 10**7)
    run.metrics.write_text(line(1) + line(2))
    answer = Growth(run).answer(earlier, 2)
    assert answer["epoch"] != earlier
    assert len(answer["rows"]) == 2


def contrast(first, second):
    """Ratio of the relative luminances of two colours, (red, green, blue) to 255, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [value / 255 for value in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
def test_frames_of_idle_experts_are_seen_light_and_dark(run, browser):
    run.metrics.write_text(line(1, load_per_expert=[[0.0, 0.06], [0.5, 0.9]]))
    with serving(Growth(run), 0) as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#cells i.few")
        assert page.locator("#cells i.few").count() == 2  # with less than an eighth of the target, one half
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = page.locator("#cells i.few").evaluate_all(
                """all => all.map((cell) => {
                  const style = getComputedStyle(cell);
                  return [style.outlineColor, style.backgroundColor, getComputedStyle(document.body).backgroundColor,
                    style.opacity];
                })"""
            )
            for *colours, opacity in found:
                frame, (*fill, strength), paper = (
                    [float(number) for number in re.findall(r"[\d.]+", colour)] for colour in colours
                )
                shown = [strength * a + (1 - strength) * b for a, b in zip(fill, paper, strict=True)]
                assert opacity == "1"
                assert min(contrast(frame, shown), contrast(frame, paper)) >= 3
        check_accessible(page)
        page.close()


@pytest.mark.slow
def test_the_page_follows_the_run_and_says_its_state(run, browser, monkeypatch):
    monkeypatch.setattr(growth_module, "QUIET_SECONDS", 0.5)
    run.metrics.write_text(line(1, load_per_expert=[[0.05] * 32] * 2))
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page, wrong, asked, loads = context.new_page(), [], [], []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("load", lambda: loads.append(page.url))

    def expect(words):
        page.locator("#state", has_text=words).wait_for(timeout=5000)

    with serving(Growth(run), 0) as url:
        page.goto(url)
        page.wait_for_selector('svg[aria-label="Loss at step 2: 4"]')  # the axis has at least two steps
        expect("Stopped at step 1 of 10: no process trains it.")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("#name").text_content() == run.path.name  # as text
        with run.metrics.open("a") as file:
            file.write(line(2) + line(3))
        page.wait_for_selector('svg[aria-label="Loss at step 3: 2"]', timeout=5000)
        expect("Training: step 3 of 10")
        expect("Stopped at step 3 of 10")
        run.path.rename(moved := run.path.with_name("moved"))
        expect("is not there any more")
        moved.rename(run.path)
        finish(run)
        expect("Finished: 10 steps, validation loss 2.5000.")
        assert page.locator("#more").text_content() == "It went well."
        assert len(loads) == 1
        assert all(address.startswith(url) for address in asked)
        assert wrong == []
    expect("The program that served this page has ended.")
    assert page.locator('svg[aria-label="Loss at step 3: 2"]').count() == 1  # what was there stays
    context.close()
