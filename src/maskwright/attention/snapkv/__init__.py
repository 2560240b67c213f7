"""Room: SnapKV."""

from maskwright.attention.snapkv.method import SnapKV as SnapKV
