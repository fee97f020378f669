"""What a cache can be asked: each file holds tasks, which register by name."""

from kivicache.tasks import fidelity, gsm8k, longbench, retrieval
from kivicache.tasks.base import TASKS, Item, Subject, Task, parse_task

__all__ = ["TASKS", "Item", "Subject", "Task", "fidelity", "gsm8k", "longbench", "parse_task", "retrieval"]
