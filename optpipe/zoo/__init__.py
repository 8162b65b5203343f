"""Small reference models and tasks, really trained, from data that every machine has."""
