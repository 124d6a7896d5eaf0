"""Run the quality study, from where it stands.

    python benchmarks/quality/study.py CHECKPOINT [--minutes 150] [--jobs 2] [--tasks verses] [--systems lora_o pt1_o]
    python benchmarks/quality/study.py CHECKPOINT --list

CHECKPOINT is a folder of SmolLM2-135M-Instruct (examples/smollm2.py makes it). What is to be run stands in grid.yaml;
a run that has its file in results/ is not run again, so that the study goes on wherever it was stopped, on any machine.
Each job is a process of one thread, and two of them on two cores do more than one on both.

results/TASK/SYSTEM/kK-seedS.json.gz: losses and predictions item by item, metrics, sizes, settings, versions, date,
device and commit. A search's run is scored on Slice-A; a run of the five seeds on Slice-B, which nothing else reads;
an ablation's (--ablations) on Slice-C. --again runs what is run once more after Slice-B was read, on Slice-D, and
--transfer the searches at other sizes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from grid import GRID, Losses, Run, system_of, wanted_ablations, wanted_again, wanted_runs, wanted_transfers
from results_table import clean_commit, device_name
from splits import DATA, Sizes, assign_slices, read_items, spread_slice, write_lines

HERE = Path(__file__).parent
RESULTS = HERE / "results"
VERSES = HERE.parents[1] / "examples" / "data" / "archaic_modern.jsonl.gz"


def items_of(task: str) -> list[dict[str, Any]]:
    """The task's items, each with `id` and `slice`, as many as the grid says."""
    sizes = {"train": GRID["slices"]["train"], "A": GRID["slices"]["a"], "B": GRID["slices"]["b"]}
    sizes |= {"C": GRID["ablations"]["size"], "D": GRID["again"].get(task, {"size": 0})["size"]}
    if task == "verses":
        verses = [{"id": v["ref"], "group": v["ref"].rpartition(":")[0], **v} for v in read_items(VERSES)]
        items = assign_slices(verses, Sizes(**GRID["slices"]))
        taken = {item["group"] for item in items}
        items = [item for item in items if item["slice"] != "B"]
        for name in ("B", "C", "D"):
            untouched = spread_slice(verses, taken, sizes[name], GRID["verses_of_a_chapter"])
            taken |= {item["group"] for item in untouched}
            items += [{"slice": name, **item} for item in untouched]
    else:
        items = read_items(DATA / f"{task}.jsonl.gz")
        of_slice = {name: [item for item in items if item["slice"] == name] for name in sizes}
        taken = {item["group"] for name in ("train", "A", "B") for item in of_slice[name][: sizes[name]]}
        beyond = [item for name in ("B", "A") for item in of_slice[name][sizes[name] :]]
        items += [{**item, "slice": "D"} for item in beyond if item["group"] not in taken]
    return [i for name, size in sizes.items() for i in [i for i in items if i["slice"] == name][:size]]


def write_slices(task: str, folder: Path) -> None:
    items = items_of(task)
    for name in {item["slice"] for item in items}:
        lines = [json.dumps(item, ensure_ascii=False) for item in items if item["slice"] == name]
        (folder / f"{task}-{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def result_path(run: Run) -> Path:
    return RESULTS / f"{run.name}.json.gz"


def losses() -> Losses:
    """Of every run that has its file."""
    found = {}
    for path in sorted(RESULTS.glob("*/*/k*-seed*.json.gz")):
        (document,) = read_items(path)
        run = Run(**{name: document[name] for name in ("task", "system", "k", "seed")})
        loss = document["metrics"]["loss"]
        found[run] = math.inf if loss is None else float(loss)
    return found


def experiment_of(run: Run, checkpoint: str, slices: Path, out: Path) -> dict[str, Any]:
    """The run as an experiment's document: its training, and the loss on its slice."""
    task, system = GRID["tasks"][run.task], system_of(run.system)
    evaluation: dict[str, Any] = {"metrics": ["nll"]}
    if answers_all(run):
        evaluation |= {"metrics": ["nll", *task["metrics"]], "max_new_tokens": task["max_new_tokens"], "stop": "\n"}
    if not run.is_search:
        evaluation["retain"] = str(DATA / "general.jsonl")
    return {
        "name": run.system,
        "model": {"path": checkpoint, **GRID["load"]},
        "adapter": {**system["config"], "task_type": "CAUSAL_LM"},
        "data": {
            "train": str(slices / f"{run.task}-train.jsonl"),
            "eval": str(slices / f"{run.task}-{run.slice}.jsonl"),
            "prompt": task["prompt"], "completion": task["completion"], "id": "{id}", "max_tokens": 256,
        },
        "evaluation": evaluation,
        "training": {
            "max_steps": GRID["steps"], "per_device_train_batch_size": GRID["batch"], "learning_rate": run.rate,
            "warmup_steps": GRID["warmup_steps"], "lr_scheduler_type": "cosine",
            "train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 16, "use_cpu": True,
            "save_strategy": "no", "logging_steps": 8, "disable_tqdm": True,
            **system.get("training", {}),
        },
        "seeds": [run.seed],
        "output_dir": str(out),
    }  # fmt: skip


def answers_all(run: Run) -> bool:
    """Whether text is generated for every item of the slice, as its loss is taken; else for the first, afterwards."""
    return run.slice == "B" and bool(GRID["tasks"][run.task]["generated"] >= GRID["slices"]["b"])


def perform(run: Run, checkpoint: str, slices: Path, commit: str, keep: str | None = None) -> None:
    """Train, score, and write the run's file; the adapter under `keep`, if that is given."""
    from bem_peft.experiments.evaluate import evaluate_adapter
    from bem_peft.experiments.experiment import ExperimentError, check_experiment
    from bem_peft.experiments.fields import Problems
    from bem_peft.experiments.run import run_experiment
    from bem_peft.experiments.sections import DataSection, EvaluationSection

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        document = experiment_of(run, checkpoint, slices, out)
        problems = Problems()
        experiment = check_experiment(document, problems)
        if experiment is None:
            raise ExperimentError(run.name, problems)
        result = run_experiment(experiment, report=lambda line: print(f"{run.name}: {line}", flush=True))[0]
        folder = out / f"seed-{run.seed}"
        items = read_lines(folder / "items.jsonl")
        metrics, retained = dict(result["metrics"]), None
        if not run.is_search:
            retained = [
                {k: line[k] for k in ("nll", "base_nll", "tokens")} for line in read_lines(folder / "retain.jsonl")
            ]
        if run.slice == "B" and not answers_all(run):
            task = GRID["tasks"][run.task]
            generated = evaluate_adapter(
                str(folder / "adapter"), DataSection(**{**document["data"], "eval_items": task["generated"]}),
                out / "generated", name=run.system, seed=run.seed, batch=30, **GRID["load"],
                evaluation=EvaluationSection(["nll", *task["metrics"]], task["max_new_tokens"], stop="\n"),
            )  # fmt: skip
            metrics |= {name: generated["metrics"][name] for name in task["metrics"]}
            texts = {i["id"]: i for i in read_lines(out / "generated" / f"seed-{run.seed}" / "items.jsonl")}
            for item in items:
                item |= {k: texts[item["id"]][k] for k in ("prediction", "reference")} if item["id"] in texts else {}
        if keep:
            shutil.copytree(folder / "adapter", Path(keep) / run.name, dirs_exist_ok=True)
    kept = ("id", "nll", "tokens", "prediction", "reference")
    record = {
        "task": run.task, "system": run.system, "k": run.k, "seed": run.seed, "learning_rate": run.rate,
        "slice": run.slice, "metrics": finite(metrics), "parameters": result["parameters"],
        "curve": finite(result["curve"]), "training_seconds": round(result["training_seconds"], 1),
        "seconds": round(time.monotonic() - start, 1),
        "items": [{k: finite(i[k]) for k in kept if k in i} for i in items],
        "retained": retained, "grid": system_of(run.system), "load": GRID["load"],
        "provenance": result["provenance"]["versions"],
        "kernels": os.environ.get("BEM_PEFT_KERNELS", "auto"),
        "date": datetime.date.today().isoformat(), "device": device_name(), "commit": commit,
    }  # fmt: skip
    path = result_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [record])


def finite(value: Any) -> Any:
    """Numbers that JSON does not have (of a run that diverged) as null, at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def claim(run: Run, work: Path) -> bool:
    """Whether this process takes the run; one whose taker is gone may be taken again."""
    path = work / (run.name.replace("/", "__") + ".claim")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = path.read_text(encoding="utf-8").strip()
    if not owner or Path(f"/proc/{owner}").exists():
        return False
    path.unlink(missing_ok=True)
    return claim(run, work)


def work_through(options: argparse.Namespace, work: Path, deadline: float, commit: str) -> None:
    """Run what is wanted until the deadline; a search whose next rate depends on a run of another job is waited for."""
    slices = work / "slices"
    while time.time() < deadline:
        wanted = wanted_now(options)
        if not wanted:
            return
        run = next((run for run in wanted if claim(run, work)), None)
        if run is None:
            time.sleep(5)
            continue
        started = time.monotonic()
        perform(run, options.checkpoint, slices, commit, options.keep)
        print(f"{run.name}: loss {losses()[run]:.4f}, {time.monotonic() - started:.0f} s", flush=True)


def wanted_now(options: argparse.Namespace) -> list[Run]:
    if options.ablations:
        return list(wanted_ablations(losses(), options.systems))
    if options.again:
        return list(wanted_again(losses(), options.tasks, options.systems))
    if options.transfer:
        return list(wanted_transfers(losses(), options.systems))
    return list(wanted_runs(losses(), options.tasks, options.systems))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run is begun after these")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--tasks", nargs="+", choices=list(GRID["tasks"]), default=list(GRID["tasks"]))
    parser.add_argument("--systems", nargs="+", choices=list(GRID["systems"]), default=list(GRID["systems"]))
    parser.add_argument("--ablations", action="store_true", help="run those of the systems, and nothing else")
    parser.add_argument("--again", action="store_true", help="run what comes once more after Slice-B, and nothing else")
    parser.add_argument("--transfer", action="store_true", help="run the searches at other sizes, and nothing else")
    parser.add_argument("--keep", metavar="FOLDER", help="for the runs' adapters; else they are not kept")
    parser.add_argument("--list", action="store_true", help="print what is to be run now, and run nothing")
    parser.add_argument("--job", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print(*(run.name for run in wanted_now(options)), sep="\n")
        return
    commit = clean_commit(("bem_peft", ":(glob)benchmarks/quality/*.py", f"{HERE / 'grid.yaml'}", f"{DATA}"))
    if options.job:
        work_through(options, Path(options.job), options.deadline, commit)
        return
    deadline = time.time() + 60 * min(options.minutes, 1e6)
    work = Path(tempfile.mkdtemp(prefix="quality-"))
    (work / "slices").mkdir()
    for task in options.tasks:
        write_slices(task, work / "slices")
    environment = {"BEM_PEFT_KERNELS": "cpp", **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(Path(options.checkpoint).resolve()), "--tasks", *options.tasks]
    command += ["--systems", *options.systems]
    command += [f"--{name}" for name in ("ablations", "again", "transfer") if getattr(options, name)]
    command += ["--keep", str(Path(options.keep).resolve())] if options.keep else []
    jobs = [
        subprocess.Popen([*command, "--job", str(work), "--deadline", str(deadline)], env=environment)
        for _ in range(options.jobs)
    ]
    codes = [job.wait() for job in jobs]
    shutil.rmtree(work)
    if any(codes):
        raise SystemExit(f"a job ended with an error: exit codes {codes}")


if __name__ == "__main__":
    main()
