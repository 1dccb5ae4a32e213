"""Chat in the terminal. Each turn has its own context; only the memory connects the turns.

    python examples/chat.py <model folder or name> [--adapter folder]

/on and /off switch the memory on and off. /save FILE and /load FILE write it to disk and read it back. /forget clears
it, /state shows it, and /quit ends the program. Without an adapter the memory has random weights: it is written, but
the model has not learned to use it.
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


def draw_states(states: dict[int, torch.Tensor]) -> str:
    """Draw each layer's states, R lines per layer, with the heads side by side. The largest number is the darkest."""
    largest = max((float(state.abs().max()) for state in states.values()), default=0.0) or 1.0
    lines = []
    for index, state in sorted(states.items()):
        lines.append(f"layer {index}")
        for row in state[0].abs().transpose(0, 1).flatten(1).tolist():  # [R, H·R]
            lines.append("".join(2 * SHADES[round(x / largest * (len(SHADES) - 1))] for x in row))
    return "\n".join(lines) or "(empty)"


def run_command(model: torch.nn.Module, line: str, states: dict, on: bool) -> tuple[dict, bool]:
    """Run a line that begins with /. Return the states and whether the memory is on."""
    name, _, path = line.partition(" ")
    if name in ("/on", "/off"):
        return states, name == "/on"
    if name == "/forget":
        return {}, on
    if name == "/state":
        print(draw_states(states))
    elif name in ("/save", "/load") and path:
        try:
            if name == "/save":
                save_memory(states, path)
            else:
                loaded = load_memory(path)
                MemoryCall(model, loaded)  # raises if the states do not fit the model
                states = loaded
        except (OSError, ValueError) as error:
            print(error)
    else:
        print("commands: /on /off /save FILE /load FILE /forget /state /quit")
    return states, on


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return "/quit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter", help="a folder written by save_adapter or by the δ-mem authors' code")
    parser.add_argument("--tokens", type=int, default=200, help="maximum length of an answer, in tokens")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval().requires_grad_(False)
    if arguments.adapter:
        load_adapter(model, arguments.adapter)
    else:
        attach_memory(model, DeltaMemConfig(delta_heads=("q", "o")))
    states, on = {}, True
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while (line := read_line()) != "/quit":
        if line.startswith("/"):
            states, on = run_command(model, line, states, on)
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
