"""Text logs: what trainers print, a line per step, in their own ways.

A line is searched for pairs of a name and a number: ``loss: 2.31``, ``lm loss = 2.31``,
``step 10/100``, ``{'loss': 2.31}``. That covers llm.c, nanoGPT, modded-nanogpt,
Megatron-LM, torchtitan, axolotl, OLMo and most others. Which names matter is learned
from the first lines; then one expression reads all of them.
"""

import re

from optax_stability._doctor import _columns
from optax_stability._doctor._log import Rows, rows_of

_NUMBER = (
    r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"|[-+]?(?:[nN][aA][nN]|[iI]nf(?:inity)?|INF)"
)
_SEPARATED_NUMBER = re.compile(
    rf"""['"]?\s*(?:[:=]\s*|\s)['"]?({_NUMBER})(?![\w.]*[A-Za-z_])"""
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PAIR = re.compile(
    r"""(?<![\w/.])['"]?(?P<name>[A-Za-z][\w./\-]*(?:[ ][A-Za-z][\w./\-]*){0,3})['"]?"""
    rf"""\s*(?:[:=]\s*|\s)['"]?(?P<number>{_NUMBER})(?![\w.]*[A-Za-z_])"""
)
# What only this trainer prints, in any of the first lines.
_TRAINERS = {
    "Megatron-LM": re.compile(r"iteration\s+\d+/\s*\d+ \|.*lm loss"),
    "torchtitan": re.compile(r"step:\s+\d+\s+loss:\s+\S+.*(?:tps|memory):"),
    "llm.c": re.compile(r"^step\s+\d+/\d+ \|.*loss|^s:\d+ t[re]l:", re.MULTILINE),
    "modded-nanogpt": re.compile(r"^step:\d+/\d+ (?:train|val)_loss:", re.MULTILINE),
    "nanoGPT": re.compile(r"^iter \d+: loss|^step \d+: train loss", re.MULTILINE),
    "OLMo": re.compile(r"^\[?.*\[step=\d+/\d+", re.MULTILINE),
    "Hugging Face Trainer": re.compile(r"\{['\"](?:eval_)?loss['\"]:"),
}
_LEARN_FROM = 400
_OF_INTEREST = re.compile(r"[lL]oss|LOSS|[nN]orm|[lL]earning|\blr\b")


def rows(text: str) -> Rows | None:
    """Rows of a text log; None if no line has a loss or a gradient norm."""
    text = _COLOUR.sub("", text) if "\x1b" in text else text
    lines = text.splitlines()
    wanted = _wanted(lines)
    names = _columns.recognised(list(wanted), {})
    if not {_columns.LOSS, _columns.NORM, _columns.HELD_OUT} & set(names):
        return None
    pattern = _pattern(list(dict.fromkeys(wanted)))
    records = _records(lines, pattern)
    head = "\n".join(lines[:_LEARN_FROM])
    trainer = next((name for name, how in _TRAINERS.items() if how.search(head)), "")
    # nanoGPT evaluates on the training data too, beside the loss of each batch.
    if trainer == "nanoGPT" and any("loss" in each for each in records):
        for each in records:
            each.pop("train loss", None)
    _unify_steps(records, names.get("step"))
    return rows_of(records, trainer)


def _unify_steps(records: list[dict[str, str]], name: str | None) -> None:
    """One name for the step: some trainers call it otherwise in evaluations."""
    others = {each for each in set().union(*records) if _columns.is_step(each)} - {name}
    if name is None or not others:
        return
    for record in records:
        found = next((each for each in others if each in record), None)
        if found is not None:
            record.setdefault(name, record[found])


def _wanted(lines: list[str]) -> list[str]:
    """Names of pairs that a history has a place for, from lines all over the log."""
    likely = [i for i, line in enumerate(lines) if _OF_INTEREST.search(line)]
    every = max(len(likely) // _LEARN_FROM, 1)
    found: dict[str, None] = {}
    chosen = likely[:_LEARN_FROM] + likely[_LEARN_FROM::every]
    for i in chosen:
        # Some logs print the step in a line of its own, before the loss.
        for line in lines[max(i - 1, 0) : i + 1]:
            for match in _PAIR.finditer(line):
                name = _without_words(match["name"])
                if name:
                    found[name] = None
    return list(found)


def _without_words(name: str) -> str:
    """The end of a name that is recognised, without the words before it; "" if none."""
    words = name.split(" ")
    for start in range(len(words)):
        tail = " ".join(words[start:])
        if _columns.is_known(tail):
            return tail
    return name if "loss" in words[-1].lower() else ""


def _pattern(names: list[str]) -> re.Pattern[str]:
    """Finds these names with their numbers."""
    either = "|".join(re.escape(each) for each in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w/.\-])({either}){_SEPARATED_NUMBER.pattern}")


def _records(lines: list[str], pattern: re.Pattern[str]) -> list[dict[str, str]]:
    """The pairs of each line that has some."""
    records: list[dict[str, str]] = []
    names: tuple[str, ...] = ()
    for line in lines:
        # Most lines have the names of the last one, in the same order.
        found = _same_names(line, names)
        if found is None:
            found = {match[1]: match[2] for match in pattern.finditer(line)}
            if len(found) > 1:
                names = tuple(found)
        if found:
            records.append(found)
    return records


def _same_names(line: str, names: tuple[str, ...]) -> dict[str, str] | None:
    """The pairs of a line with these names in this order; None if it has others.

    A search for plain text is much faster than the expression for any name.
    """
    found, at = {}, 0
    for name in names:
        at = line.find(name, at)
        if at < 0 or (at and (line[at - 1].isalnum() or line[at - 1] in "_/.-")):
            return None
        number = _SEPARATED_NUMBER.match(line, at + len(name))
        if number is None:
            return None
        found[name], at = number[1], number.end()
    if not found or _OF_INTEREST.search(line, at):
        return None
    return found
