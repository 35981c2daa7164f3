"""What the tests of sampling ask, and the token that ends an answer of the model from scratch."""

QUESTIONS = ["7=", "123456=", "90+12="]
END = 1
