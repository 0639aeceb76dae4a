"""Similarity of students to their teachers: predictions, features and weights of classifiers."""
