"""A layer with the names and signatures of the authors' that `patch` knows, and none of their code."""

import torch
from deltamem.kernels.affine_scan import loop, triton_affine_scan, triton_scan_support


def load_delta_mem_online_state(model, state):
    layers = dict(model.named_modules())
    for name, tensor in state.items():
        layers[name].delta_state = tensor.to(layers[name].out.dtype)


class DeltaMemAttention(torch.nn.Module):
    def __init__(self, granularity="token", hidden=6, rank=4):
        super().__init__()
        self.memory_write_granularity = granularity
        self.write_enabled = True
        self.write_message_ids = self.write_sentence_ids = self.read_context_mask = None
        self.projections = torch.nn.Parameter(torch.randn(6, rank, hidden))
        self.out = torch.nn.Parameter(torch.randn(hidden, rank))
        self.delta_state, self.scan_impl = None, "auto"

    def forward(self, hidden_states, position_embeddings, attention_mask=None):
        state = self._ensure_state(hidden_states.shape[0], hidden_states.device, hidden_states.dtype)
        # in float64, so that each token's projections are rounded to the same bits in calls of any length
        q, k, v, *gates = (hidden_states.double().unsqueeze(-3) @ self.projections.double().mT).unbind(-3)
        operands = [q, torch.nn.functional.normalize(k, dim=-1), v, *(gate.sigmoid() for gate in gates)]
        operands = [x.to(hidden_states.dtype) for x in operands]
        if self.write_enabled:
            self.delta_state, reads = self.scan(state, *operands)
        else:
            reads = self._token_state_reads(state, operands[0], None, attention_mask)
        return reads @ self.out.T * position_embeddings[0], None

    def _ensure_state(self, batch_size, device, dtype):
        state = self.delta_state
        if state is None or (state.shape[0], state.device, state.dtype) != (batch_size, device, dtype):
            rank = self.projections.shape[1]
            self.delta_state = torch.zeros(batch_size, rank, rank, device=device, dtype=dtype)
        return self.delta_state

    def _token_state_reads(self, state, memory_q_seq, read_route_seq, token_mask):
        return memory_q_seq @ state.mT

    def scan(self, *operands, token_mask=None):
        supported = self.scan_impl != "torch" and triton_scan_support(*operands).supported
        return (triton_affine_scan if supported else self._memory_affine_scan_torch)(*operands, token_mask=token_mask)

    def _memory_affine_scan_torch(
        self,
        state,
        memory_q_seq,
        memory_k_seq,
        memory_v_seq,
        keep_seq,
        erase_seq,
        write_seq,
        token_mask=None,
    ):
        return loop(state, memory_q_seq, memory_k_seq, memory_v_seq, keep_seq, erase_seq, write_seq, token_mask)

    def _inputs(self, token_mask, *ids):
        if not self.write_enabled or any(x is None for x in ids):
            return None
        active = torch.stack([x >= 0 for x in ids]).all(0)
        active = active if token_mask is None else active & token_mask
        return (*ids, active) if active.any() else None

    def _message_write_inputs(self, hidden_states, token_mask):
        return self._inputs(token_mask, self.write_message_ids)

    def _sentence_write_inputs(self, hidden_states, token_mask):
        return self._inputs(token_mask, self.write_message_ids, self.write_sentence_ids)

    def _build_message_write_means(self, hidden_states, token_mask):
        given = self._message_write_inputs(hidden_states, token_mask)
        if self.memory_write_granularity != "message_mean" or given is None:
            return None, None, None
        return self._means(hidden_states, given[0], *given)

    def _build_sentence_write_means(self, hidden_states, token_mask):
        given = self._sentence_write_inputs(hidden_states, token_mask)
        if self.memory_write_granularity != "sentence_mean" or given is None:
            return None, None, None
        return self._means(hidden_states, *given)

    @staticmethod
    def _means(x, message_ids, ids, active):
        rows, segments = x.shape[0], int(ids[active].max()) + 1
        means, messages = x.new_zeros(rows, segments, x.shape[-1]), torch.full((rows, segments), -1)
        for b in range(rows):
            for i in ids[b][active[b]].unique().tolist():
                chosen = active[b] & (ids[b] == i)
                means[b, i] = x[b, chosen].mean(0)
                messages[b, i] = message_ids[b, chosen][0]
        return means, messages >= 0, messages
