{# In `main`: row and `vec4` column of the result that this invocation computes. #}
    let i = group_id(wid) * {{ size }}u + lid;
    let col = i % {{ width }}u;
    let row = i / {{ width }}u;
    if (row >= {{ rows }}u) {
        return;
    }
