"""`cacheplan run`: generate text under a plan."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.facts import percent, size
from cacheplan.cli.options import PLAN, Device, Dtype, Json, Model
from cacheplan.cli.output import emit, say, suggest
from cacheplan.errors import InputError

TAIL = 40  # characters of a prompt that are shown


def run(
    plan: Annotated[
        Path, typer.Option(metavar="FILE", help="The file of `cacheplan solve`.")
    ] = PLAN,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help='The same from a file; "-" is stdin.')
    ] = None,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Generate text with the cache held to a plan.

    \b
    Examples:
      cacheplan run --plan plan.json
      cacheplan run --plan plan.json --prompt-file long.txt --max-new-tokens 256
    """
    if prompt_file is not None:
        if prompt is not None:
            raise InputError("Both --prompt and --prompt-file are given: choose one.")
        prompt = _read(prompt_file)
    found = api.generate(
        api.load_plan(plan),
        prompt=prompt,
        model=model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        on_text=None if as_json else _stream,
    )
    if as_json:
        emit(dataclasses.asdict(found))
    else:
        print()  # ends the streamed line
        if prompt is None:
            say(f"The prompt ended: {tail(found.prompt)}")
    say(generation_words(found))
    suggest(f"cacheplan verify {plan}")


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from error


def tail(text: str) -> str:
    """The last words of a text."""
    if len(text) <= TAIL:
        return text
    return "... " + text[-TAIL:].partition(" ")[2]


def generation_words(found: api.Generation) -> str:
    """Speed, bytes and attention path in one line; the first token belongs to the prompt's time."""
    words = f"{found.prompt_tokens} + {found.new_tokens} tokens"
    if found.new_tokens > 1 and found.decode_seconds > 0:
        words += f", {(found.new_tokens - 1) / found.decode_seconds:.1f} tokens/s"
    return (
        f"{words}; cache {size(found.planned_bytes)} planned, {size(found.measured_bytes)} "
        f"measured, {percent(found.measured_bytes / found.full_bytes)} of full; "
        f"attention: {found.path}"
    )
