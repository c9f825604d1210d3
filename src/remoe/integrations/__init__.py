"""Remoe inside other people's trainers."""
