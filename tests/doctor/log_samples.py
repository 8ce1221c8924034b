"""One log in the form of each trainer: ten rows, a held-out loss now and then."""

import csv
import io
import json

STEPS = [10 * i for i in range(1, 11)]
LOSS = [round(3.0 - 0.1 * i, 4) for i in range(10)]
NORM = [round(1.5 - 0.05 * i, 4) for i in range(10)]
RATE = [round(1e-4 * (1 + i), 8) for i in range(10)]
HELD_OUT = {50: 2.9, 100: 2.4}
ROWS = list(zip(STEPS, LOSS, NORM, RATE, strict=True))


def _lines(row, held_out=None, first=True):
    """A line per row, and one for each evaluation."""
    lines = []
    for each in ROWS:
        lines.append(row(*each))
        if held_out and each[0] in HELD_OUT:
            lines.insert(
                len(lines) if first else -1, held_out(each[0], HELD_OUT[each[0]])
            )
    return "\n".join(lines) + "\n"


def json_lines():
    return _lines(
        lambda s, x, n, r: json.dumps(
            {"step": s, "loss": x, "grad/norm": n, "learning_rate": r}
        ),
        lambda s, x: json.dumps({"step": s, "eval/loss": x}),
    )


def maxtext():
    return _lines(
        lambda s, x, n, r: json.dumps(
            {
                "step": s,
                "learning/loss": x,
                "learning/raw_grad_norm": n,
                "learning/grad_norm": min(n, 1.0),
                "learning/current_learning_rate": r,
                "perf/step_time_seconds": 1.5,
            }
        ),
        lambda s, x: json.dumps({"step": s, "evaluation/avg_loss": x}),
    )


def trainer_state():
    history = []
    for s, x, n, r in ROWS:
        row = {"epoch": s / 50, "grad_norm": n, "learning_rate": r, "loss": x}
        history.append(row | {"step": s})
        if s in HELD_OUT:
            history.append({"epoch": s / 50, "eval_loss": HELD_OUT[s], "step": s})
    history.append({"epoch": 2.0, "step": 100, "train_loss": 2.55, "train_runtime": 9})
    return json.dumps({"global_step": 100, "log_history": history}, indent=2)


def log_history():
    return json.dumps(json.loads(trainer_state())["log_history"])


def columns_of_json():
    return json.dumps({"step": STEPS, "loss": LOSS, "grad_norm": NORM, "lr": RATE})


def plain_csv(sep=","):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=sep)
    writer.writerow(["step", "train_loss", "grad_norm", "lr", "val_loss", "note"])
    for s, x, n, r in ROWS:
        writer.writerow([s, x, n, r, HELD_OUT.get(s, ""), "fine"])
    return file.getvalue()


def wandb_export():
    head = ["Step"]
    for name in ("train/loss", "train/grad_norm"):
        head += [f"sunny-sky-7 - {name}{end}" for end in ("", "__MIN", "__MAX")]
    lines = [",".join(f'"{each}"' for each in head)]
    lines += [f"{s},{x},{x},{x},{n},{n},{n}" for s, x, n, _ in ROWS]
    return "\n".join(lines)


def wandb_export_of_two_runs():
    lines = ['"Step","first - train/loss","second - train/loss"']
    lines += [f"{s},{x},{x + 1}" for s, x, _, _ in ROWS]
    return "\n".join(lines)


def llm_c():
    return "| device | A100 |\n| params | 124475904 |\n" + _lines(
        lambda s, x, n, r: (
            f"step {s:4d}/100 | loss {x:.6f} (+nanz)| norm {n:.4f} (+0.10z)| "
            f"lr {r:.2e} | 2958.41 ms | 47.1% bf16 MFU | 177224 tok/s"
        ),
        lambda s, x: f"val loss {x:.6f}",
    )


def llm_c_main_log():
    return _lines(
        lambda s, x, n, r: f"s:{s} trl:{x:.4f} lr:{r:.6f} norm:{n:.2f}",
        lambda s, x: f"s:{s} tel:{x:.4f}",
    )


def nano_gpt():
    return "number of parameters: 124.34M\n" + _lines(
        lambda s, x, n, r: f"iter {s}: loss {x:.4f}, time 251.92ms, mfu 41.20%",
        lambda s, x: f"step {s}: train loss {x - 0.1:.4f}, val loss {x:.4f}",
        first=False,
    )


def modded_nanogpt():
    return _lines(
        lambda s, x, n, r: f"step:{s}/100 train_loss:{x:.4f} train_time:1421ms",
        lambda s, x: f"step:{s}/100 val_loss:{x:.4f} train_time:1421ms step_avg:142ms",
    )


def megatron():
    return _lines(
        lambda s, x, n, r: (
            f" [2024-05-01 10:00:11] iteration {s:8d}/     100 | consumed samples: "
            f"{s * 256:12d} | elapsed time per iteration (ms): 4123.1 | learning rate: "
            f"{r:.6E} | global batch size:   256 | lm loss: {x:.6E} | "
            f"loss scale: 1.0 | grad norm: {n:.3f} | number of skipped iterations:   "
            "0 | number of nan iterations:   0 |"
        ),
        lambda s, x: (
            f" validation loss at iteration {s} | lm loss value: {x:.6E} | "
            "lm loss PPL: 1.1E+01 |"
        ),
    )


def torchtitan():
    return _lines(
        lambda s, x, n, r: (
            f"[titan] 2025-01-01 00:00:00,000 - root - INFO - \x1b[31mstep: {s:2d}  "
            f"\x1b[32mloss: {x:7.4f}  \x1b[38;2;1;2;3mgrad_norm: {n:.4f}  "
            "\x1b[33mmemory: 30.92GiB(39.01%)  \x1b[34mtps: 8,123  \x1b[35mmfu: 40.00%"
            "\x1b[39m"
        )
    )


def axolotl():
    return "loading the model: 7 shards\n" + _lines(
        lambda s, x, n, r: (
            str({"loss": x, "grad_norm": n, "learning_rate": r, "epoch": s / 50})
            + f"\n {s}%|███       | {s}/100 [01:11<10:10,  7.1s/it]"
        ),
        lambda s, x: str({"eval_loss": x, "eval_runtime": 11.2, "epoch": s / 50}),
    )


def olmo():
    return _lines(
        lambda s, x, n, r: (
            f"2024-01-01 00:00:00 INFO [step={s}/100]\n    train/CrossEntropyLoss={x}\n"
            f"    train/Perplexity=12.1\n    optim/total_grad_norm={n}\n"
            f"    optim/learning_rate_group0={r}"
        )
    )


def someone():
    return _lines(
        lambda s, x, n, r: f"[epoch 1] step {s}, training loss = {x}, lr = {r:.1e}"
    )


# Form → (name of the file, text, trainer, which of norm, rate, held-out, step it has)
ALL = {
    "json lines": ("log.jsonl", json_lines, "", "nrhs"),
    "MaxText": ("metrics.txt", maxtext, "MaxText", "nrhs"),
    "trainer_state": (
        "trainer_state.json",
        trainer_state,
        "Hugging Face Trainer",
        "nrhs",
    ),
    "log_history": ("history.json", log_history, "", "nrhs"),
    "columns": ("columns.json", columns_of_json, "", "nrs"),
    "CSV": ("run.csv", plain_csv, "", "nrhs"),
    "TSV": ("run.tsv", lambda: plain_csv("\t"), "", "nrhs"),
    "CSV with semicolons": ("run.csv", lambda: plain_csv(";"), "", "nrhs"),
    "W&B": ("wandb_export.csv", wandb_export, "Weights & Biases", "ns"),
    "llm.c": ("out.txt", llm_c, "llm.c", "nrhs"),
    "llm.c main.log": ("main.log", llm_c_main_log, "llm.c", "nrhs"),
    "nanoGPT": ("out.log", nano_gpt, "nanoGPT", "hs"),
    "modded-nanogpt": ("run.txt", modded_nanogpt, "modded-nanogpt", "hs"),
    "Megatron-LM": ("out.log", megatron, "Megatron-LM", "nrhs"),
    "torchtitan": ("out.log", torchtitan, "torchtitan", "ns"),
    "axolotl": ("out.log", axolotl, "Hugging Face Trainer", "nrh"),
    "OLMo": ("out.log", olmo, "OLMo", "nrs"),
    "someone": ("out.txt", someone, "", "rs"),
}
