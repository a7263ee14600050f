from data.emoji.build import main

main()
