"""The span protocol as its specification writes it, one token at a time in plain Python. Shares nothing with the code under test."""


class Reference:
    """Runs the automaton over a sequence and answers may_attend(t, s)."""

    def __init__(self, token_ids, vocab, *, header_view="span", prompt_view="causal", prompt_window_tokens=16):
        self.header_view, self.prompt_view, self.window = header_view, prompt_view, prompt_window_tokens
        self.carries, self.named, self.is_response, self.is_header, self.is_seg = [], [], [], [], []
        self.unresolved_refs = 0
        self.solve_position = None
        label, named, in_response, ended = 0, set(), False, False
        for position, x in enumerate(token_ids):
            x = int(x)
            seg = x - vocab.seg_base if vocab.seg_base <= x < vocab.seg_base + vocab.num_labels else None
            ref = x - vocab.ref_base if vocab.ref_base <= x < vocab.ref_base + vocab.num_labels else None
            is_first_solve = False
            named_now = None
            if not ended:
                if x == vocab.solve_id and not in_response:
                    in_response, label, named, is_first_solve = True, 0, set(), True
                    self.solve_position = position
                elif seg is not None:
                    label = seg
                    if in_response:
                        named = set()
                elif ref is not None and in_response:
                    named = named | {ref}
                    named_now = ref
            self.carries.append(label)
            if named_now is not None and named_now not in self.carries:
                self.unresolved_refs += 1
            self.named.append(frozenset(named))
            self.is_seg.append(seg is not None)
            self.is_response.append(in_response and not is_first_solve)
            self.is_header.append(self.is_response[-1] and (seg is not None or ref is not None))
            if x == vocab.eos_id:
                ended = True

    def may_attend(self, t, s):
        if s > t:
            return False
        if not self.is_response[t]:
            if self.prompt_view == "causal":
                return True
            return self.carries[s] in {0, self.carries[t]} or t - s < self.window
        if self.carries[s] in {0, self.carries[t]} | self.named[t]:
            return True
        if self.is_header[t] and self.header_view == "all":
            return True
        if self.is_header[t] and self.header_view == "labels" and self.is_seg[s]:
            return True
        return self.is_header[t] and self.header_view == "prompt" and s <= self.solve_position

    def mask(self):
        n = len(self.carries)
        return [[self.may_attend(t, s) for s in range(n)] for t in range(n)]

    def reaches(self, t):
        """Every position that a chain of may_attend steps leads to from t, t itself included."""
        found, frontier = set(), [t]
        while frontier:
            position = frontier.pop()
            if position not in found:
                found.add(position)
                frontier += [s for s in range(position + 1) if self.may_attend(position, s)]
        return found
