"""`cacheplan run`: generate text or draw a picture under a plan."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.budget import parse_bytes
from cacheplan.cli.feature_facts import drawing_words
from cacheplan.cli.kv_facts import generation_words, tail
from cacheplan.cli.options import (
    PLAN,
    Call,
    Device,
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    Model,
    OffloadFolder,
    placement_of,
)
from cacheplan.cli.output import emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.errors import InputError
from cacheplan.picture_grid import check_picture_file, write_picture
from cacheplan.picture_inputs import read_object, read_settings
from cacheplan.plans.words import simulation_words
from cacheplan.types import FeaturePlan, Plan

PICTURE = Path("out.png")
NEW_TOKENS, TEMPERATURE = 64, 0.0


def run(
    plan: Annotated[
        Path, typer.Option(metavar="FILE", help="The file of `cacheplan solve`.")
    ] = PLAN,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue or to draw."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help='The same from a file; "-" is stdin.')
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A picture to show a vision-language model."),
    ] = None,
    model: Model = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Of text; 64."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0.0, help="Of text; 0 takes the likeliest token."),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Read the prompt N tokens at a time and evict after each, to bound memory.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of the sampling or the noise; 0.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The picture to write; out.png."),
    ] = None,
    arguments: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|JSON",
            help="What a diffusion pipeline draws, such as '{\"class_labels\": [3]}'.",
        ),
    ] = None,
    call: Call = None,
    cache_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help='The most that kept features may take: "64MiB".'),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    as_json: Json = False,
) -> None:
    """Generate text, or draw a picture, under a plan.

    Without a prompt the embedded model gets its first held-out one.  Text goes to stdout, a
    picture into a file.

    \b
    Examples:
      cacheplan run --plan plan.json
      cacheplan run --plan plan.json --prompt-file long.txt --max-new-tokens 256
      cacheplan run --plan plan.json --image chart.png --prompt "What does it show?"
      cacheplan run --plan pictures.json --prompt "two striped green squares on grey" -o a.png
    """
    if prompt_file is not None:
        if prompt is not None:
            raise InputError("Both --prompt and --prompt-file are given: choose one.")
        prompt = _read(prompt_file)
    followed = api.load_plan(plan)
    pictures = {"out": out, "arguments": arguments, "call": call, "cache-memory": cache_memory}
    placement = placement_of(device_map, max_memory, offload_folder)
    texts = {
        "max-new-tokens": max_new_tokens,
        "temperature": temperature,
        "image": image,
        "prefill-chunk": prefill_chunk,
        "device-map": placement,
    }
    if isinstance(followed, FeaturePlan):
        _refuse(texts, followed)
        path = out or PICTURE
        check_picture_file(path)
        with progress(str(path), "steps") as report:
            drawn = api.draw(
                followed,
                prompt=prompt,
                arguments=None if arguments is None else read_object(arguments, "--arguments"),
                model=model,
                settings=read_settings(call),
                seed=seed,
                cache_memory=None if cache_memory is None else parse_bytes(cache_memory),
                device=device,
                dtype=dtype,
                progress=report,
            )
        write_picture(drawn.picture, path)
        if as_json:
            facts = vars(drawn) | {"picture": str(path), "simulated": bool(followed.linears)}
            emit(facts)
        else:
            print(path)
        say(drawing_words(drawn))
        if words := simulation_words(followed):
            say(f"few bits {words}")
    else:
        _refuse(pictures, followed)
        found = api.generate(
            followed,
            prompt=prompt,
            image=image,
            model=model,
            max_new_tokens=NEW_TOKENS if max_new_tokens is None else max_new_tokens,
            temperature=TEMPERATURE if temperature is None else temperature,
            seed=seed or 0,
            device=device,
            dtype=dtype,
            on_text=None if as_json else _stream,
            prefill_chunk=prefill_chunk,
            placement=placement,
        )
        if as_json:
            emit(dataclasses.asdict(found))
        else:
            print()  # ends the streamed line
            if prompt is None:
                say(f"The prompt ended: {tail(found.prompt)}")
        say(generation_words(found))
    suggest(f"cacheplan verify {plan}")


def _refuse(options: Mapping[str, object], plan: Plan) -> None:
    """InputError for options that do not fit the plan's family."""
    for name, value in options.items():
        if value is not None:
            raise InputError(
                f"--{name} does not fit a plan for the {plan.family} model {plan.model.id}: leave "
                "it out."
            )


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from error
