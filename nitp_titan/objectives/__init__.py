"""The method: NITP and its rivals, losses beside next-token prediction (NTP).

Read it as the paper goes:

    settings.py            `[nitp]`: what can be chosen
    alignment.py           which implicit token a position predicts, and whether it has one (Eq. 2, Fig. 2)
    distances.py           how far the projected state is from it (Eq. 3, Table 7)
    sites.py               names of the hidden states that are observed
    objective.py           the protocol: all that an objective brings
    nitp.py                NITP: projector, shallow target, their sum over a chunk
    cosine_regularizer.py  the generic regulariser of the ablation (Table 3)
    registry.py            the objective that settings name
    loss.py                cross-entropy plus weight times the objective, chunk by chunk (Eq. 4)
    decoder.py             a decoder's forward with the capture of the shallow states
    variant.py             any decoder of TorchTitan with an objective
    parallelize.py         FSDP unit and pipeline stage of the projector
    export.py              what a deployed model leaves behind (App. H)
"""
