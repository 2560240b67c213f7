"""Room: vertical-slash."""

from maskwright.attention.vertical_slash.method import VerticalSlash as VerticalSlash
