"""Check the kernels on a GPU, then time them beside every peer that is installed.

    python kernels/bench --out table.md

Needs torch, triton and numpy, and a GPU; ends within --seconds, whatever a peer does, and writes
what was measured by then. With --dry it needs no GPU: the checks run on a tiny problem in Triton's
interpreter, and nothing is timed.
"""

import argparse
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SLACK = 20.0
"""Seconds that the timer has to end the process, before it is ended without its page."""
sys.path[:0] = [str(HERE), str(HERE.parent)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="kernels/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the document to write")
    parser.add_argument(
        "--seconds", type=float, default=500.0, help="when to end, with what was measured"
    )
    parser.add_argument("--repeats", type=int, default=50, help="timed runs, fewer of what is slow")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shapes", nargs="*", help="parts of names of shapes; all if none")
    which.add_argument(
        "--layer",
        nargs=5,
        type=int,
        metavar=("T", "D", "F", "E", "K"),
        help="a layer of your own instead: tokens, model and expert dim, experts, experts a token",
    )
    parser.add_argument("--only", nargs="*", help="names of contenders; all if none")
    parser.add_argument("--add", action="store_true", help="keep the document's other rows")
    parser.add_argument(
        "--peer-runs",
        type=int,
        help="runs of each config where peers tune; Triton's tenth of a second if not given",
    )
    parser.add_argument("--tune", action="store_true", help="measure tile shapes first")
    parser.add_argument("--dry", action="store_true", help="checks alone, without a GPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 where a check fails or ours does, 2 where it cannot run."""
    started, options = time.monotonic(), parse(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch
    from contenders import CONTENDERS
    from dmoe_kernels.configs import tune_kernels
    from measure import limit_tuning
    from run import Bench, check

    if options.dry:
        return int(not check(torch.device("cpu"), torch.float32, 1e-5))
    unknown = set(options.only or ()) - set(CONTENDERS)
    if unknown:
        print(f"--only {min(unknown)}: there are {', '.join(CONTENDERS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no GPU here; --dry runs the checks without one", file=sys.stderr)
        return 2
    # The timer below cannot stop what never lets another thread of Python run; this can.
    faulthandler.dump_traceback_later(options.seconds + SLACK, exit=True)
    if not check(torch.device("cuda"), torch.bfloat16, 1e-2):
        faulthandler.cancel_dump_traceback_later()
        return 1
    if options.tune:
        tune_kernels(lambda line: print(line, flush=True))
    if options.peer_runs:
        limit_tuning(options.peer_runs)
    bench = Bench(options)
    timer = threading.Timer(started + options.seconds - time.monotonic(), bench.stop)
    timer.daemon = True
    timer.start()
    try:
        bench.run()
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
    return int(not bench.good)


if __name__ == "__main__":
    sys.exit(main())
