"""Choices in words: for the terminal, the guide and the report."""

from figures.measured import Measured
from figures.words import TOO_FEW, format_count
from planning.choosing import Candidate, Choice, Needs

NONE = "none that was measured"
KIND_WORDS = {
    "native": "of the frameworks' own servers",
    "docker": "of the servers in their images",
    "local": "of this repository's own servers, which are not compared with those",
}


def describe_needs(needs: Needs) -> str:
    """What is asked for, in one line."""
    parts = [f"{needs.rate:,.4g} requests/s" if needs.rate < 10_000 else f"{needs.rate:,.0f} requests/s"]
    if needs.rows > 1:
        parts.append(f"{format_count(needs.rows, 'row')} a request")
    if needs.p99_ms:
        parts.append(f"p99 within {needs.p99_ms:,g} ms")
    if needs.memory_mb:
        parts.append(f"at most {needs.memory_mb:,.0f} MB")
    if needs.cold_start_s:
        parts.append(f"a first answer within {needs.cold_start_s:g} s")
    if needs.framework != "any":
        parts.append(f"a model in {needs.framework}")
    words = {
        "python": "your own Python around the model",
        "reload": "new versions while it serves",
        "grpc": "gRPC",
        "maintained": "maintained",
    }
    parts += [text for name, text in words.items() if getattr(needs, name)]
    return ", ".join(parts)


def describe_candidate(measured: Measured, one: Candidate) -> str:
    plan = one.plan
    p99 = f"{TOO_FEW} requests for a p99" if one.p99_ms is None else f"p99 {one.p99_ms:.1f} ms"
    return (
        f"{measured.label(plan.server)}: {format_count(plan.replicas, 'replica')}, {format_count(plan.cores, 'core')}; "
        f"one keeps up with {plan.sustained_rate:,.0f}/s, {p99} there; {one.memory_mb:,.0f} MB, "
        f"{one.start_s:.1f} s to the first answer"
    )


def describe_recommendations(measured: Measured, choice: Choice) -> list[str]:
    """A sentence for each kind of row that has a candidate; it names all that the measurements do not tell apart."""
    by_name = {one.plan.server: one for one in choice.candidates}
    sentences = []
    for kind, names in choice.recommended.items():
        first, *ties = names
        plan = by_name[first].plan
        sentence = f"{KIND_WORDS[kind]}: {first}, {format_count(plan.cores, 'core')}"
        if ties:
            sentence += f"; {' and '.join(ties)} may need as few, because their limits lie between two offered rates; "
            sentence += f"{first} takes about the least memory"
        sentences.append(sentence)
    return sentences or ["no server that was measured meets all of this"]


def describe_cores(choice: Choice) -> str:
    """The first recommendation of each kind with its cores, those of `local` servers in italics."""
    by_name = {one.plan.server: one for one in choice.candidates}
    parts = []
    for kind, (first, *_) in choice.recommended.items():
        text = f"{first}, {format_count(by_name[first].plan.cores, 'core')}"
        parts.append(f"*{text}*" if kind == "local" else text)
    return "; ".join(parts) or "–"


def name_recommendations(recommended: dict[str, tuple[str, ...]]) -> str:
    """The recommended servers of each kind, in few words."""
    return "; ".join(f"{' or '.join(names)} ({kind})" for kind, names in recommended.items()) or NONE


def describe_choice(measured: Measured, choice: Choice) -> list[str]:
    """The lines that choose.py prints."""
    lines = [describe_needs(choice.needs)]
    lines += [describe_candidate(measured, one) for one in choice.candidates]
    nearest = sorted(choice.refused.items(), key=lambda item: len(item[1]))
    lines += [f"{measured.label(name)}: out: {'; '.join(reasons)}" for name, reasons in nearest]
    prefix = "take, " if choice.candidates else ""
    return [*lines, *(prefix + text for text in describe_recommendations(measured, choice))]
