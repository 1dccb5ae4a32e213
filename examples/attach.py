"""Attach a memory to a model: python examples/attach.py <model folder or name>"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_kernels.integrations.transformers import attach_memory, save_adapter
from deltamem_kernels.nn import DeltaMemConfig

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).requires_grad_(False)
attach_memory(model, DeltaMemConfig(rank=8, delta_heads=("q", "o")))  # does not change the output until it is trained
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
print(sum(p.numel() for p in model.parameters() if p.requires_grad), "weights to train")
save_adapter(model, "memory-untrained")
