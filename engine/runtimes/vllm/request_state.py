"""vLLM's state of a request, which sends tokens at the pace of the streams and counts them.

vLLM itself sends a fixed number of tokens with each event, the `stream_interval`.

Importing this module imports vLLM.
"""

from __future__ import annotations

from typing import Any

from engine.runtimes.vllm.stream_pace import PACE, READ_BY_PARSER
from engine.usage import COUNTED
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import output_processor
from vllm.v1.engine.output_processor import RequestState

ADAPTIVE = 0
"""The `stream_interval` of a request that names none."""


class PacedRequestState(RequestState):  # type: ignore[misc]
    """Holds tokens back as vLLM does, but by the pace. The first and the last never wait.

    Every token is counted when it comes, for the request of the task that made this state.

    A `stream_interval` of the client is kept as it is. Tokens that a parser reads do not wait.
    """

    def __init__(self, *args: Any, stream_interval: int, **kwargs: Any) -> None:
        super().__init__(*args, stream_interval=1, **kwargs)
        if stream_interval == ADAPTIVE and READ_BY_PARSER.get():
            stream_interval = 1
        self._wanted = stream_interval
        self._sent_s = 0.0
        self._usage = COUNTED.get()
        self._begun = False
        self._paced = self.detokenizer is not None and self.output_kind == RequestOutputKind.DELTA

    def _due(self, held: int) -> bool:
        if self._wanted == ADAPTIVE:
            return PACE.due(held, self._sent_s)
        return held >= self._wanted

    def make_request_output(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The output to send, or None while its tokens are held back."""
        usage = self._usage
        if usage is not None:
            usage.output_tokens += len(new_token_ids)
            if not self._begun:
                self._begun = True
                # Several answers to one prompt have it in common.
                if self.parent_req is None or self.request_index == 0:
                    usage.input_tokens += self.prompt_len
                    usage.cached_tokens += self.num_cached_tokens
        if self._paced:
            sent = self.sent_tokens_offset
            held = self.detokenizer.num_output_tokens() - sent
            if finish_reason is None and sent and not self._due(held):
                return None
            self._sent_s = PACE.now_s()
            new_token_ids = self.detokenizer.output_token_ids[sent:]
            self.sent_tokens_offset: int = sent + held
        return super().make_request_output(
            new_token_ids, pooling_output, finish_reason, *args, **kwargs
        )


def pace_streams() -> None:
    """Have vLLM use the class above for its requests. Call once, before the first engine."""
    output_processor.RequestState = PacedRequestState
