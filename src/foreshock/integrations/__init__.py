"""Watching inside other people's trainers, and sending rows to other people's dashboards. No package is required."""
