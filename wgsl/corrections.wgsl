// Bias corrections 1 - beta^t of AdamW, two per page of a parameter: c <- beta c + (1 - beta). hyper: lr, gradient scale, apply.
// A power would lose digits for small t.
{# Inside: i < count pages, and c has two elements for each page up to first + count. hyper has three elements. #}
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    if (i >= {{ count }}u || hyper_at(2u) == 0.0) {
        return;
    }
    let page = 2u * ({{ first }}u + i);
    c_put(page, {{ beta1 }} * c_at(page) + {{ one_minus_beta1 }});
    c_put(page + 1u, {{ beta2 }} * c_at(page + 1u) + {{ one_minus_beta2 }});
}
