"""Laws that a memory obeys only inside a document already begun: name -> law -> the line of its sheet that says so.

The suite checks both halves: the law holds there, and really fails elsewhere. Names are those of the catalog and of the
compositions in tests/test_laws.py.
"""

WHOLE_QUESTION = (
    "One decision per (sequence, layer), shared by all heads and all active tokens; it depends on the whole question, "
    "hence is not causal inside the question."
)
NO_NEW_ROUTING = "Ordinary cached decoding, one token at a time, no new routing."

ROUTED = {
    "split": WHOLE_QUESTION,
    "step": NO_NEW_ROUTING,
    "causal": WHOLE_QUESTION,
    "gradients": NO_NEW_ROUTING,  # those through the scan of step
    "sharded": WHOLE_QUESTION,  # a rank sees its slice of the question
}

PREFIX = "Every row, also i < M, sees the WHOLE encoder sum: rows inside the prompt are bidirectional through it."
DECODING = "Decode: continue Based's step from (S,z); W_k_enc and W_v_enc are not used any more."

PREFIXED = {
    "split": "Tokens generated after the prompt are never re-encoded.",
    "step": DECODING,
    "causal": PREFIX,
    "gradients": DECODING,  # those through the scan of step
    "sharded": PREFIX,  # a rank sees its slice of the prompt
}

EXCEPTIONS: dict[str, dict[str, str]] = {"msa": ROUTED, "language_model_with_store": ROUTED, "jrt_rnn": PREFIXED}
