-- Selection: bids on some auctions.
SELECT auction, price FROM nexmark.bids WHERE auction % 123 = 0
