"""Evaluate Hugging Face models side by side: the paper's benchmarks, MTEB on frozen states, or any text.

python scripts/evaluate.py --model NTP=outputs/ntp/hf NITP=outputs/nitp/hf --suite paper
python scripts/evaluate.py --model NTP=outputs/ntp/hf NITP=outputs/nitp/hf --suite local --text my.jsonl
python scripts/evaluate.py --model owner/name --suite quick --limit 100

The first model is the baseline. Finished tasks are kept in --out: the same command resumes where it stopped. The suites
paper, quick and mteb load data from the Hugging Face hub (token: HF_TOKEN); local and --text need no network.
"""

import argparse
import logging
from pathlib import Path

import _checkout  # noqa: F401
import torch

from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.evaluation import embeddings, harness, perplexity
from nitp_titan.evaluation.local_suite import DEFAULT_FOLDER
from nitp_titan.evaluation.plan import Plan
from nitp_titan.evaluation.pretrained import read_models, require, SPREAD
from nitp_titan.evaluation.run import evaluate, EvaluationSettings
from nitp_titan.evaluation.suites import SUITES
from nitp_titan.evaluation.tables import Comparison
from nitp_titan.export.dtypes import DTYPES
from nitp_titan.machine import exits


def main() -> None:
    arguments = _parser().parse_args()
    require("transformers")
    settings = _settings(arguments)
    models = read_models([model for models in arguments.model for model in models])
    plan = _plan(arguments, models)
    # Libraries warn of what is no news here, such as the end of the data.
    logging.getLogger().setLevel(logging.ERROR)
    results = evaluate(models, plan, settings)
    if not any(results.scores.values()):
        (model, task), reason = next(iter(results.failures.items()))
        raise UserError(f"{task} of {model} was not run: {reason}")
    comparison = Comparison(models, plan, settings, results)
    comparison.write(settings.out)
    print(f"\n{comparison.markdown()}\n{settings.out}/results.md  {settings.out}/results.json")
    if results.failures:
        raise UserError(f"{len(results.failures)} tasks were not run, see above; the same command tries them again.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", action="append", required=True, metavar="[NAME=]MODEL", help="a folder, or owner/name")
    add("--suite", help=f"benchmarks: {', '.join(SUITES)}")
    add("--tasks", nargs="+", default=[], help="only these benchmarks of the suite")
    add("--limit", type=int, help="documents per task of a suite of the harness, for a trial")
    add("--text", type=Path, help="JSON lines, parquet or .txt whose perplexity is measured, packed as in training")
    add("--text-field", default="text", help="field that holds a document's text (%(default)s)")
    add("--seq-len", type=int, help="tokens per packed sequence")
    add("--local-suite", type=Path, default=DEFAULT_FOLDER, help="folder of the suite 'local' (%(default)s)")
    add("--out", type=Path, default=Path("outputs/evaluation"), help="folder of the results (%(default)s)")
    add("--batch-size", type=int, default=8, help="sequences at a time (%(default)s)")
    add("--dtype", help=f"{', '.join(DTYPES)}; default: bfloat16 on a GPU, else float32")
    add("--device", help="as torch names it, or spread: over all GPUs; default: the GPU if there is one")
    return parser


def _settings(arguments: argparse.Namespace) -> EvaluationSettings:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device="cpu" if device == SPREAD else device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    dtype = arguments.dtype or ("bfloat16" if torch.cuda.is_available() and device != "cpu" else "float32")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known.{nearest_choice(dtype, [*DTYPES])}")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: at least 1.")
    return EvaluationSettings(arguments.out, dtype, device, arguments.batch_size)


def _plan(arguments: argparse.Namespace, models: list) -> Plan:
    suite, limit = arguments.suite, arguments.limit
    if suite is None and arguments.text is None:
        raise UserError(f"nothing to evaluate: give --suite ({', '.join(SUITES)}) or --text FILE.jsonl, or both.")
    if suite is not None and suite not in SUITES:
        raise UserError(f"--suite {suite} is not known.{nearest_choice(suite, [*SUITES])}")
    if limit is not None and (limit < 1 or suite in (None, "mteb")):
        raise UserError(f"--limit {limit}: at least 1, and for the suites of the harness only; MTEB has no limit.")
    if arguments.tasks and suite is None:
        raise UserError("--tasks chooses from a suite; give --suite too.")
    plan = Plan()
    if arguments.text is not None:
        plan += perplexity.plan(arguments.text, arguments.text_field, arguments.seq_len, models)
    if suite == "mteb":
        plan += embeddings.plan(arguments.tasks)
    elif suite is not None:
        plan += harness.plan(suite, arguments.tasks, limit=limit, local_folder=arguments.local_suite)
    if not plan.tasks:
        raise UserError(f"--tasks {' '.join(arguments.tasks)}: {plan.missing[0][1]}.")
    return plan


if __name__ == "__main__":
    exits.run(main, kept="finished tasks are kept; the same command resumes.")
