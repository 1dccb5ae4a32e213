"""A layer with the names and signatures of the authors' that `patch` knows, and none of their code."""

import torch
from deltamem.kernels.affine_scan import loop, triton_affine_scan, triton_scan_support


class DeltaMemAttention(torch.nn.Module):
    def __init__(self, granularity="token"):
        super().__init__()
        self.memory_write_granularity = granularity
        self.write_enabled = True
        self.write_message_ids = self.write_sentence_ids = None

    def scan(self, *operands, token_mask=None):
        supported = triton_scan_support(*operands).supported
        return (triton_affine_scan if supported else loop)(*operands, token_mask=token_mask)

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
