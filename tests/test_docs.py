"""What README and the documentation say holds: examples run, commands parse, links and symbols exist."""

import inspect
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from remoe import routing
from remoe.errors import RemoeError
from remoe.lab.cli.main import COMMANDS, main
from remoe.lab.compare.experiment import experiment_from_dict
from remoe.lab.training.presets import preset
from remoe.routing.options import check_options

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]}
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n$")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
# The authors' code, TensorBoard, a script, and Megatron-LM.
OTHER_PROGRAMS = {"--save", "--moe-relu-routing", "--logdir", "--results", "--moe-routing-trace-path", "--append-eod"}
OTHER_PROGRAMS |= {"--max-restarts", "--rdzv-id", "--nproc-per-node"}  # torchrun's
OTHER_PROGRAMS |= {
    "--parts",
    "--reduced",
    "--minutes",
    "--speed",
    "--whole",
    "--processes",
}  # those of scripts in benchmarks/ and experiments/
SLOW = {"docs/guides/convert.md", "docs/guides/fine-tune.md"}  # over 5 seconds


def blocks(page, language):
    """Code of the page's fenced blocks, without those that a comment excuses."""
    text = PAGES[page]
    found = [match for match in FENCE.finditer(text) if match[1] == language]
    return [match[2] for match in found if not NOT_RUN.search(text[: match.start()])]


def with_blocks(language):
    pages = [page for page in sorted(PAGES) if blocks(page, language)]
    return [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in pages]


def prose(page):
    return FENCE.sub("", PAGES[page])


def inline_code(page):
    return [" ".join(code.split()) for code in INLINE.findall(prose(page))]


def commands(page):
    """The argument lists of `remoe` in a page's shell blocks."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words[1:] for words in parts if words and words[0] == "remoe"]


def rows(page, heading):
    """Cells of the rows of the first table under a heading."""
    below = f"\n{PAGES[page]}".split(f"\n{heading}\n")[1]
    table = re.search(r"^\|.*?(?=\n\n|\Z)", below, flags=re.DOTALL | re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_examples_run_in_the_order_of_the_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, namespace = dict(routing.ROUTERS), {"__name__": "example"}
    try:
        for example in blocks(page, "python"):
            exec(compile(example, page, "exec"), namespace)
    finally:
        routing.ROUTERS.clear()
        routing.ROUTERS.update(before)


class Parsed(Exception):
    pass


def parsed(argv, monkeypatch):
    """The options that a command takes from its arguments; it does not run."""
    name = next(name for name in (" ".join(argv[:2]), argv[0]) if name in COMMANDS)
    module = import_module(COMMANDS[name][0])
    parse = module.parse

    def stop(*args, **kwargs):
        raise Parsed(parse(*args, **kwargs))

    command = getattr(module, COMMANDS[name][1])
    with monkeypatch.context() as patch:
        patch.setattr(module, "parse", stop)
        with pytest.raises(Parsed) as caught:
            command(argv[len(name.split()) :])
    return caught.value.args[0]


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_shell_commands_parse(page, monkeypatch):
    for argv in commands(page):
        options = parsed(argv, monkeypatch)
        if getattr(options, "router_options", None):
            check_options(options.router, routing.ROUTERS[options.router], options.router_options)


def test_a_command_that_does_not_exist_is_found_out(monkeypatch):
    with pytest.raises(StopIteration):
        parsed(["trian"], monkeypatch)
    with pytest.raises(RemoeError):
        parsed(["train", "--model.experts", "loop"], monkeypatch)


@pytest.mark.parametrize("argv", [argv for page in sorted(PAGES) for argv in commands(page) if argv[0] == "plan"])
def test_plans_are_printed(argv, capsys):
    assert main(argv) == 0
    assert "parameters" in capsys.readouterr().out


def test_options_in_the_text_exist(capsys):
    known = set(OTHER_PROGRAMS)
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help-all"])
        known |= set(re.findall(r"--[a-z][\w.-]*\w", capsys.readouterr().out))
    named = {(option, page) for page in PAGES for code in inline_code(page) for option in option_names(code)}
    assert {(option, page) for option, page in named if option not in known | {"--help", "--help-all"}} == set()


def option_names(code):
    return re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code)


def test_every_command_is_in_the_reference():
    named = {" ".join(code.split()[1:]) for code in inline_code("docs/commands.md") if code.startswith("remoe ")}
    for name in COMMANDS:
        assert any(f"{code} ".startswith(f"{name} ") for code in named), name


def test_readme_installs_with_the_constraints_and_trains():
    text = "".join(blocks("README.md", "bash"))
    setup = next(line for line in text.splitlines() if line.endswith("remoe train"))
    assert "venv" in setup
    assert "-c constraints.txt" in setup
    assert (ROOT / "constraints.txt").is_file()


def test_ci_runs_the_test_command_of_readme():
    text = "".join(blocks("README.md", "bash"))
    command = next(line for line in text.splitlines() if "pytest" in line)
    ci = (ROOT / ".ci" / "run").read_text()
    for part in command.split(" && "):
        assert part in ci


def test_extras_in_the_text_exist():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page, text in PAGES.items():
        named = {extra for extras in re.findall(r"'\.\[(.+?)\]'", text) for extra in extras.split(",")}
        named |= set(re.findall(r"[Ee]xtra:? `(\w+)`", text))
        assert named <= known.keys(), page


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.is_file(), target
        if anchor:
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)}


def slug(heading):
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_in_the_text_exist(page):
    places = r"(?:tests|src|examples|experiments|benchmarks|docs)/[\w./-]+"
    for code in inline_code(page):
        if re.fullmatch(places, code) and not re.search(r"[A-Z]{3}", code):
            assert (ROOT / code).exists(), code


def test_documents_that_the_source_names_exist():
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
    named = {(name, file.name) for file in files for name in re.findall(r"docs/[\w./-]+\.md", file.read_text())}
    assert named
    assert {(name, file) for name, file in named if not (ROOT / name).is_file()} == set()


def test_each_equation_of_the_paper_is_where_the_table_says():
    table = rows("docs/architecture.md", "## Paper to code")
    assert [int(re.match(r"Eq\. (\d+)", row[0])[1]) for row in table] == list(range(5, 14))
    for equation, formula, symbol in table:
        module, _, path = symbol.strip("`").partition(":")
        found = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        number = re.match(r"Eq\. (\d+)", equation)[1]
        assert formula
        assert re.search(rf"Eq\. (\d+ and )?{number}\b", inspect.getsource(found)), symbol


def test_the_table_of_presets_is_right():
    for cells in rows("docs/guides/train.md", "## Presets"):
        name, shape, vocabulary, course, rate, rule = (cell.strip("` |") for cell in cells)
        settings = preset(name)
        model = settings["model"]
        width, layers, heads, keys = (int(number) for number in re.findall(r"\d+", shape))
        assert width == model["hidden_size"]
        assert (layers, heads) == (model["num_hidden_layers"], model["num_attention_heads"])
        assert keys == model["num_key_value_heads"]
        assert int(vocabulary.replace(",", "")) == settings["vocab_size"]
        steps, batch, length = (int(number) for number in re.findall(r"\d+", course.replace(",", "")))
        assert (steps, batch, length) == (settings["steps"], settings["batch_size"], settings["seq_len"])
        assert float(rate) == settings["optim"]["lr"]
        assert rule == settings["sparsity"]["rule"]


def test_the_experiment_of_the_guide_loads():
    (example,) = blocks("docs/guides/compare.md", "yaml")
    mine = experiment_from_dict(yaml.safe_load(example), "x", "x.yaml")
    assert len(mine.runs) == 4 * (3 + 1 + 3)  # points, and the seeds of each variant


def test_every_option_of_every_router_is_named():
    named = {row[0].strip("` |"): set(re.findall(r"`(\w+)`", row[1])) for row in rows("docs/routers.md", "## Options")}
    named["relu_scaled"] |= named["relu"]  # "and those of `relu`"
    for name, router in routing.ROUTERS.items():
        assert named.get(name, set()) - {"relu"} == set(routing.router_options(router))


def test_every_router_is_in_the_table():
    assert {row[0].strip("` |") for row in rows("docs/routers.md", "# Routers")} == routing.ROUTERS.keys()
