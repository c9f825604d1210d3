"""`remoe train`."""

from dataclasses import replace
from pathlib import Path

from remoe.errors import ConfigError
from remoe.lab.cli.helps import TRAIN
from remoe.lab.cli.parsing import check_router, importing, parse
from remoe.lab.training.config import FROM, TrainConfig, config_from_dict, read_options

PROG = "remoe train"


def train_command(argv: list[str]) -> int:
    """Trains or continues a run; returns 128 plus the signal's number when a signal stopped it."""
    # Only to find the preset, the file or the run that the flags are laid over.
    given = parse(TrainConfig, argv, prog=PROG, brief=TRAIN)
    check_router(given.router)

    with importing():
        from remoe.lab.console import say
        from remoe.lab.training.elastic import check_launch, is_restarted
        from remoe.lab.training.folder import RunFolder, first_run_path, new_run_path, newest_run
        from remoe.lab.training.prolong import branch, branching_run

    if given.resume and given.config:
        raise ConfigError("--resume uses the options of the run: leave --config out")
    check_launch(given.out)
    restarted = given.out is not None and is_restarted(RunFolder(given.out))
    saved = origin = None
    flags = {arg.split("=")[0].removeprefix("--").replace("-", "_") for arg in argv if arg.startswith("--")}
    # The defaults of other options depend on these.
    deciding = {name: getattr(given, name) for name in ("preset", "batch_size") if name in flags}
    if given.resume:
        run = branching_run(Path(given.from_)) if given.from_ else RunFolder(given.out or newest_run())
        saved = run.load_config()
        # It may be continued on another mesh; a branch needs a folder of its own.
        base = replace(saved, mesh=None, live=False, log=[], out=None if given.from_ else saved.out)
    elif restarted:
        run = RunFolder(given.out)
        base = saved = run.load_config()
    else:
        values, source = (read_options(given.config), given.config) if given.config else ({}, "flags")
        if values.get("resume"):
            raise ConfigError(f"{source}: a file cannot resume a run; use remoe train --out RUN --resume")
        values |= deciding
        if start := given.from_ or values.get(FROM):
            with importing():
                from remoe.lab.training.origin import open_origin
            origin = open_origin(str(start))
            values[FROM] = str(origin.folder)
            base = origin.base(values, source)
        else:
            base = config_from_dict(values, source)
    config = parse(TrainConfig, argv, prog=PROG, default=base)
    config.from_ = base.from_
    if origin is not None:
        origin.check(base, config)
    config.resume = given.resume or restarted
    if given.resume and given.from_:
        run = branch(Path(given.from_), saved, config)
    elif not config.resume:
        run = RunFolder(Path(config.out) if config.out else new_run_path(config))
        if not config.out and (earlier := first_run_path(config)) != run.path:
            say(f"{earlier} exists (continue it with --out {earlier} --resume): this run is written to {run.path}")
    config.out = str(run.path)

    with importing():
        from remoe.lab.training.train import run_training

    return run_training(config, run, saved)
