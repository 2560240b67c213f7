"""DMJD."""

from maskwright.inputs.dmjd.method import Dmjd as Dmjd
