"""The profiler, and programs that measure this project against what a user would pick instead."""
