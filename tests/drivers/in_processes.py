"""What programs of several processes begin and end with."""

import contextlib
import datetime
import gc
import json
import os
import sys
import time
import warnings

import torch
import torch.distributed as dist


@contextlib.contextmanager
def together(seconds=60):
    """A group of all processes on gloo, which gives up after some seconds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    yield
    leave()


def leave():
    """End without an abort.

    A thread of gloo lets go of the tensors of its last collective, for which it needs Python. If
    that has ended by then, so does the process: "terminate called without an active exception".
    """
    gc.collect()  # DDP is in a circle
    time.sleep(0.2)
    if dist.is_initialized():
        dist.destroy_process_group()


def everywhere(value):
    """What each process has."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def write(found):
    """The first process writes what was found to the file that the command line names."""
    if int(os.environ.get("RANK", "0")) == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file, indent=1)
