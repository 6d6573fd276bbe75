"""What a batch takes from elsewhere: rows of embedding stores, passages of a corpus, scores of a teacher."""
