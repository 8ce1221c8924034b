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
_WHOLE_NUMBER = rf"({_NUMBER})(?![\w.]*[A-Za-z_])"
# Between the numbers of interest: also times, and dates, whose hyphens are no signs.
_UNSIGNED = r"\d[\d.,:]*(?:[eE][-+]?\d+)?"
_VARYING = re.compile(rf"\s+|(?<![A-Za-z_])(?:(?<!\w)[-+])?{_UNSIGNED}")
_SEPARATOR = r"""['"]?\s*(?:[:=]\s*|\s)['"]?"""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PAIR = re.compile(
    r"""(?<![\w/.])['"]?(?P<name>[A-Za-z][\w./\-]*(?:[ ][A-Za-z][\w./\-]*){0,3})"""
    rf"{_SEPARATOR}{_WHOLE_NUMBER}"
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
# Forms of lines: how many are learned, with and without pairs, and how many are tried.
_FORMS, _KEPT_FORMS = 64, 8
# A search for plain text is much faster than an expression.
_OF_INTEREST = ("loss", "Loss", "LOSS", "norm", "Norm", "earning", "lr")


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
    names = set().union(*set(map(tuple, records)))
    others = {each for each in names if _columns.is_step(each)} - {name}
    if name is None or not others:
        return
    for record in records:
        found = next((each for each in others if each in record), None)
        if found is not None:
            record.setdefault(name, record[found])


def _wanted(lines: list[str]) -> list[str]:
    """Names of pairs that a history has a place for, from lines all over the log."""
    likely = [i for i, line in enumerate(lines) if _is_of_interest(line)]
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
    return re.compile(rf"(?<![\w/.\-])({either}){_SEPARATOR}{_WHOLE_NUMBER}")


def _is_of_interest(text: str) -> bool:
    """Whether there may be a number that a history has a place for."""
    return any(map(text.__contains__, _OF_INTEREST))


def _records(lines: list[str], pattern: re.Pattern[str]) -> list[dict[str, str]]:
    """The pairs of each line that has some."""
    records: list[dict[str, str]] = []
    forms: list[tuple[re.Pattern[str], tuple[str, ...]]] = []
    # A long head without pairs uses up nothing of what lines with pairs need.
    learned = {True: 0, False: 0}
    for line in lines:
        for form, names in forms:
            if same := form.fullmatch(line):
                if names:
                    records.append(dict(zip(names, same.groups(), strict=True)))
                break
        else:
            found = list(pattern.finditer(line))
            if found:
                records.append({match[1]: match[2] for match in found})
            if learned[bool(found)] < _FORMS:
                learned[bool(found)] += 1
                names = tuple(match[1] for match in found)
                forms = [(_form(line, found), names), *forms[: _KEPT_FORMS - 1]]
    return records


def _form(line: str, found: list[re.Match[str]]) -> re.Pattern[str]:
    """Lines that are like this one, but for their numbers; a group for each pair.

    To match a whole line takes a fraction of the time of a search for any name.
    """
    parts, at = [], 0
    for match in found:
        before, after = line[at : match.start(1)], line[match.end(1) : match.start(2)]
        parts += [_loose(before), re.escape(match[1]), _loose(after), _WHOLE_NUMBER]
        at = match.end(2)
    return re.compile("".join(parts) + _loose(line[at:]))


def _loose(text: str) -> str:
    """An expression for this text, with any numbers and any number of spaces."""
    parts, at = [], 0
    for match in _VARYING.finditer(text):
        parts.append(re.escape(text[at : match.start()]))
        parts.append(r"\s+" if match[0].isspace() else rf"[-+]?{_UNSIGNED}")
        at = match.end()
    return "".join(parts) + re.escape(text[at:])
