"""Operators of the methods. The torch forms here are the specification of any faster form."""
