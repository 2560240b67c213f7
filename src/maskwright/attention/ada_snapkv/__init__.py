"""Room: Ada-SnapKV."""

from maskwright.attention.ada_snapkv.method import AdaSnapKV as AdaSnapKV
