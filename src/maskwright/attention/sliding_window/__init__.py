"""Room: sliding window."""

from maskwright.attention.sliding_window.method import SlidingWindow as SlidingWindow
