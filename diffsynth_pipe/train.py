"""The reference's command line: ``accelerate launch -m diffsynth_pipe.train --flag value ...``; runs in every rank."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings

from diffsynth_pipe.errors import USER_ERRORS, TrainingStopped
from diffsynth_pipe.flags import FlagParser, add_config_flags, config_from_args
from diffsynth_pipe.guard import stop_with_parent


def main(argv: list[str] | None = None) -> int:
    """Run the stage that ``--task`` names; return the exit code."""
    # torch warns of its own c10d internals once per collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rank = os.environ.get("RANK", "0")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()  # torchrun gives each rank a session of its own, where it would outlive a killed launcher
    try:
        parser = FlagParser(prog="diffsynth_pipe.train", description=__doc__)
        add_config_flags(parser)
        config = config_from_args(parser.parse_flags(argv))
        if config.stage == "data_process":
            from diffsynth_pipe.stages.data_process import data_process

            result = data_process(config)
        else:
            from diffsynth_pipe.stages.train import train

            result = train(config)
    except TrainingStopped as stopped:
        if rank == "0":
            sys.stderr.write(f"{stopped}\n")
        return 128 + (stopped.signal_number or signal.SIGTERM)
    except USER_ERRORS as error:
        where = "" if rank == "0" else f" in rank {rank}"
        sys.stderr.write(f"error{where}: {error}\n")
        return 2
    if rank == "0" or result.summary.get("encoded"):
        ended = result.summary.get("why") or f"{result.state}  {result.path}"
        sys.stdout.write(f"{result.stage}: {ended}\n")
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a pipe or a log, lines would come late, or never
    exit_code = main()
    if "RANK" in os.environ:
        # All is written and closed. As the interpreter winds down, threads of gloo may abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
