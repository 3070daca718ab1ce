"""torchrun --max-restarts: ranks that are started again meet anew."""

import os
import socket

import torch.distributed as dist

_PORT = "nitp_titan/attempt_{}/port"


def use_fresh_store() -> None:
    """Let restarted ranks of one node meet at a store of their own, before the process group is made.

    torch 2.14 gives them the store of torchrun, in which the addresses of the dead ranks still stand: whoever is the
    first reads those (``rendezvous._create_c10d_store`` expects a new store for every attempt, which neither of
    torchrun's rendezvous makes). On several nodes ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` has torchrun do the same.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not shared or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = _PORT.format(attempt)
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(key, str(free.getsockname()[1]))
    # Waits for rank 0.
    os.environ["MASTER_PORT"] = store.get(key).decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
