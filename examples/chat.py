"""A chat in the terminal whose turns know of each other through the memory alone: each has a context of its own.

    python examples/chat.py <model folder or name> [--adapter folder]

/on and /off switch the memory, /save and /load FILE keep it on disk, /forget empties it, /state shows it, /quit ends.
Without an adapter the memory is random: it fills up, and the model has not learned to use it.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from deltamem_kernels.integrations.transformers import (
    MemoryCall,
    attach_memory,
    load_adapter,
    load_memory,
    save_memory,
)
from deltamem_kernels.nn import DeltaMemConfig

SHADES = " ░▒▓█"


def picture(states: dict[int, torch.Tensor]) -> str:
    """The states of each layer's heads side by side, R lines a layer; the darkest is the largest number of all."""
    largest = max((float(state.abs().max()) for state in states.values()), default=0.0) or 1.0
    lines = []
    for index, state in sorted(states.items()):
        lines.append(f"layer {index}")
        for row in state[0].abs().transpose(0, 1).flatten(1).tolist():  # [R, H·R]
            lines.append("".join(2 * SHADES[round(x / largest * (len(SHADES) - 1))] for x in row))
    return "\n".join(lines) or "(empty)"


def command(model: torch.nn.Module, line: str, states: dict, on: bool) -> tuple[dict, bool]:
    """What a line that begins with / does."""
    name, _, path = line.partition(" ")
    if name in ("/on", "/off"):
        return states, name == "/on"
    if name == "/forget":
        return {}, on
    if name == "/state":
        print(picture(states))
    elif name in ("/save", "/load") and path:
        try:
            if name == "/save":
                save_memory(states, path)
            else:
                loaded = load_memory(path)
                MemoryCall(model, loaded)  # raises where they do not fit
                states = loaded
        except (OSError, ValueError) as error:
            print(error)
    else:
        print("commands: /on /off /save FILE /load FILE /forget /state /quit")
    return states, on


def ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return "/quit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter", help="a folder that save_adapter, or the δ-mem authors' code, wrote")
    parser.add_argument("--tokens", type=int, default=200, help="the longest answer")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval().requires_grad_(False)
    if arguments.adapter:
        load_adapter(model, arguments.adapter)
    else:
        attach_memory(model, DeltaMemConfig(delta_heads=("q", "o")))
    states, on = {}, True
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while (line := ask()) != "/quit":
        if line.startswith("/"):
            states, on = command(model, line, states, on)
        elif line:
            turn = [{"role": "user", "content": line}]
            prompt = tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with MemoryCall(model, (states or None) if on else None, write=on) as call:
                model.generate(**prompt, max_new_tokens=arguments.tokens, streamer=streamer)
            states = call.states if on else states


if __name__ == "__main__":
    main()
