"""Mining of hard negatives, filtering of pairs, and scores of pairs by a teacher."""
