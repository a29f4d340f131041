-- Pass-through: every bid as it is.
SELECT auction, bidder, price, ts FROM nexmark.bids
