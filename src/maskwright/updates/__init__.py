"""Masks on updates: merging of fine-tuned models, sparse fine-tuning, forgetting."""

from maskwright.updates.apply import Added as Added
from maskwright.updates.apply import add as add
from maskwright.updates.deltas import Delta as Delta
from maskwright.updates.deltas import Deltas as Deltas
from maskwright.updates.deltas import delta as delta
from maskwright.updates.guard import guard as guard
from maskwright.updates.guard import zero_masks as zero_masks
from maskwright.updates.lora import Adapter as Adapter
from maskwright.updates.lora import Lora as Lora
from maskwright.updates.lora_files import read_peft as read_peft
from maskwright.updates.lora_files import write_peft as write_peft
from maskwright.updates.merging import Merging as Merging
from maskwright.updates.method import Tuning as Tuning
from maskwright.updates.method import TuningRun as TuningRun
from maskwright.updates.parts import MergeMethod as MergeMethod
from maskwright.updates.restriction import restrict as restrict
from maskwright.updates.shira import read_shira as read_shira
from maskwright.updates.shira import write_shira as write_shira
from maskwright.updates.state import Merged as Merged
from maskwright.updates.state import merge as merge
from maskwright.updates.twophase import TwoPhase as TwoPhase
from maskwright.updates.twophase import two_phase as two_phase
