// Chains equal ids: links[n] is the next place of the same id (or `count`), links[count + n] is 1 where the id occurs first.
// Every invocation reads all {{ count }} ids, see `kernels/embedding.rs` for the bound.
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let n = group_id(wid) * {{ size }}u + lid;
    if (n >= {{ count }}u) {
        return;
    }
    let id = ids_at(n);
    var first = 1u;
    var next = {{ count }}u;
    for (var m = 0u; m < {{ count }}u; m++) {
        let same = ids_at(m) == id;
        first = select(first, 0u, same && m < n);
        next = select(next, min(next, m), same && m > n);
    }
{% if padding >= 0 %}
    first = select(first, 0u, id == {{ padding }}u);
{% endif %}
    links_put(n, next);
    links_put({{ count }}u + n, first);
}
