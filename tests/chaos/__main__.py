"""Kill training with SIGKILL at random moments, start the same command again, and see whether anything was lost.

python tests/chaos                                    # 20 trials on one rank
python tests/chaos --async --trials 20                # checkpoints written in the background
python tests/chaos --ranks 2 --trials 10 --kills 2
python tests/chaos --moment "during a checkpoint write" --moment "during the purge"

A trial survives if it ends as an uninterrupted run does: the same weights, optimizer, schedule and data states bit for
bit, each step once in metrics.jsonl and the like, every start from the newest complete checkpoint, nothing left over.
The exit status is 1 if any was lost; their folders are kept.
"""

import argparse
import json
import shutil
import signal
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

# `python tests/chaos` has the folder itself on the path, not the one it lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import _checkout  # noqa: F401

from chaos.campaign import Campaign, CampaignSettings
from chaos.moments import MOMENTS
from chaos.trials import by_moment, table
from nitp_titan.errors import UserError
from nitp_titan.machine import exits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = CampaignSettings
    parser.add_argument("--trials", type=int, default=20, help="killed at their moments (default: 20)")
    parser.add_argument("--kills", type=int, default=1, help="per trial (default: 1)")
    parser.add_argument("--moment", action="append", help=f"repeat; default: all of {', '.join(MOMENTS)}")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default: 0)")
    parser.add_argument("--ranks", type=int, default=1, help="1, 2 or 4 (default: 1)")
    parser.add_argument("--async", action="store_true", dest="asynchronous", help="checkpoint.async_mode = async")
    parser.add_argument("--recipe", default=defaults.recipe, help=f"default: {defaults.recipe}")
    parser.add_argument("--train-config", default=defaults.train_config, help=f"default: {defaults.train_config}")
    parser.add_argument("--steps", type=int, default=defaults.steps, help=f"of a run (default: {defaults.steps})")
    parser.add_argument("--interval", type=int, default=defaults.interval, help="steps between checkpoints; default: 3")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative; default: 0, bit for bit")
    parser.add_argument("--out", type=Path, default=Path("outputs/chaos"), help="new folder (default: outputs/chaos)")
    parser.add_argument("--json", action="store_true", help="print JSON; progress goes to stderr")
    arguments = parser.parse_args()
    if arguments.trials < 1:
        raise UserError(f"--trials {arguments.trials}: it must be at least 1.")
    settings = CampaignSettings(
        recipe=arguments.recipe,
        train_config=arguments.train_config,
        num_ranks=arguments.ranks,
        asynchronous=arguments.asynchronous,
        steps=arguments.steps,
        interval=arguments.interval,
        kills=arguments.kills,
        moments=tuple(arguments.moment or ()),
        seed=arguments.seed,
        tolerance=arguments.tolerance,
    )
    log = partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    # So that a terminated campaign ends what it has started, as one that is interrupted does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    campaign, trials = Campaign(settings, arguments.out, log), []
    campaign.run_reference()
    for trial in campaign.trials(arguments.trials):
        trials.append(trial)
        log(f"trial {trial.number}: {trial}")
    lost = sum(bool(trial.problems) for trial in trials)
    survived = sum(trial.survived for trial in trials)
    if arguments.json:
        result = {"settings": asdict(settings), "survived": survived, "lost": lost, "moments": by_moment(trials)}
        print(json.dumps(result | {"trials": [asdict(trial) for trial in trials]}, indent=2))
    else:
        print(f"\n{table(trials)}\nsurvived {survived} of {survived + lost}")
    if lost:
        log(f"the folders of lost trials are in {campaign.out}")
        sys.exit(1)
    shutil.rmtree(campaign.out)


if __name__ == "__main__":
    exits.run(main, kept="what was started is ended.")
